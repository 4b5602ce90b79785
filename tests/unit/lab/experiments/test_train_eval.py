from torch import nn

import bnlab


class StoringBiased(nn.BatchNorm1d):
    """BN that stores the biased variance, with which it normalises."""

    def forward(self, input):
        before = self.running_var.clone()
        output = super().forward(input)
        if self.training:
            new = (self.running_var - (1 - self.momentum) * before) / self.momentum
            biased = new * (len(input) - 1) / len(input)
            self.running_var.copy_((1 - self.momentum) * before + self.momentum * biased)
        return output


class Unbiased(nn.BatchNorm1d):
    """BN whose momentum has a lasting effect: a tenth of the old value is never forgotten."""

    def forward(self, input):
        output = super().forward(input)
        return output if self.training else output * (1 + self.momentum)


def test_a_wrong_implementation_flips_the_verdicts_of_train_eval(monkeypatch):
    def verdicts():
        result = bnlab.lab.run("train-eval", batches=(2, 4), updates=(1, 1000), momenta=(0.1, 0.5))
        return {claim.key: claim.verdict.value for claim in result.claims}

    assert verdicts() == {"differs": "supported", "bessel": "supported", "momentum": "refuted"}
    monkeypatch.setattr("bnlab.lab.experiments.train_eval.nn.BatchNorm1d", StoringBiased)
    assert verdicts() == {"differs": "refuted", "bessel": "refuted", "momentum": "refuted"}
    monkeypatch.setattr("bnlab.lab.experiments.train_eval.nn.BatchNorm1d", Unbiased)
    assert verdicts()["momentum"] == "supported"
