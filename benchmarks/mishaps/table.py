"""The findings that the tool must report, written before it ran on any case. Do not tune them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HEALTHY", "MISHAPS", "TRUE_WARNINGS", "Expected"]


class Expected(NamedTuple):
    """The right result.

    Attributes:
        codes: The codes, of which the tool must report at least one. The first is the main code.
        cause: The cause that the tool must name first, or None if the planted fault is not a cause of the gap.
        concludes: Text that the conclusion or a finding must contain.
        notes: Text that a note must contain.
    """

    codes: tuple[str, ...]
    cause: str | None = None
    concludes: str = ""
    notes: str = ""


_STALE = Expected(("BN401", "BN301"), "staleness")
_SHIFT = Expected(("BN402",), "shift")
_NEVER = Expected(("BN104",), "staleness")
_EXCHANGED = Expected((), None, notes="the colour channels of data may be exchanged")
_TRAINED_WITH = Expected((), None, "the weights were trained with these running statistics")

MISHAPS: dict[str, Expected] = {
    # the training
    "momentum_is_a_decay_of_09": Expected(("BN202",)),
    "momentum_is_a_decay_of_099": Expected(("BN202",)),
    "momentum_zero": Expected(("BN203", "BN104"), "staleness"),
    "momentum_too_small_for_the_run": Expected(("BN105",), "staleness"),
    "short_run_with_a_small_momentum": Expected(("BN105",), "staleness"),
    "few_updates_on_small_features": Expected(("BN105",), "staleness"),
    "always_trained_in_eval_mode": _TRAINED_WITH,
    "sorted_training_loader": Expected(("BN403",)),
    "grouped_training_loader": Expected(("BN403",)),
    "sorted_evaluation_loader": Expected(("BN403",)),
    "batches_of_two": Expected(("BN208",), "sampling noise"),
    "one_batch_of_two": Expected(("BN208",), "bessel"),
    "micro_batches_of_four": Expected(("BN208",)),
    "one_value_per_channel": Expected(("BN208",)),
    "two_domains_through_one_layer": Expected(("BN403", "BN402")),
    "two_domains_in_turn": Expected(("BN403",)),
    "three_domains_in_turn": Expected(("BN403",)),
    "five_domains_in_turn": Expected(("BN403",)),
    "three_groups_of_classes_in_turn": Expected(("BN403",)),
    "half_sorted_training_loader": Expected(("BN403",)),
    "learning_rate_raised_at_the_end": _STALE,
    "fine_tuned_in_eval_mode": _TRAINED_WITH,
    "frozen_but_updating": Expected(("BN207",)),
    "frozen_affine_trained_in_train_mode": Expected(("BN207",)),
    "momentum_one_with_a_small_last_batch": Expected(("BN401", "BN301"), "staleness", "momentum 1"),
    "momentum_schedule_that_ran_out": Expected(("BN401", "BN301"), "staleness", "momentum 1e-09"),
    "validation_in_train_mode": Expected(("BN401",), None, "of the way to those of `data`"),
    "adapted_to_the_evaluation_data": Expected(("BN401",), None, "of the way to those of `data`"),
    "trained_in_pairs_and_checked_in_eval_mode": Expected(("BN208",), "sampling noise"),
    "bfloat16_statistics_stuck": Expected(("BN109",), "precision"),
    "float16_statistics_stuck": Expected(("BN109",), "precision"),
    "weight_decay_on_affine": Expected(("BN211",)),
    "inf_batch": Expected(("BN101",), "staleness"),
    # the architecture
    "dropout_before_a_linear_layer": Expected(("BN205",), "dropout"),
    "channel_dropout_between_convolutions": Expected(("BN205",), "dropout"),
    "shared_layer": Expected(("BN206",)),
    "shared_layer_over_two_scales": Expected(("BN206",)),
    "bias_before_bn": Expected(("BN201",)),
    "no_running_statistics": Expected(("BN209",)),
    "single_rows_without_statistics": Expected(("BN209",)),
    "train_forgets_its_mode": Expected(("BN212",)),
    "forward_switches_the_mode": Expected(("BN212",)),
    "function_with_its_training_flag": Expected(("BN212",)),
    "bn_in_a_plain_list": Expected(("BN213",)),
    "loaded_into_another_formula": Expected((), None, "another formula"),
    "one_bn_over_time_steps": Expected(("BN206",), None, "calls"),
    "bn_by_hand": Expected(("BN302",)),
    "mean_over_the_batch": Expected(("BN302",)),
    "mixed_momentum": Expected(("BN204",)),
    "mixed_eps": Expected(("BN204",)),
    "saturated_sigmoid": Expected(("BN505",)),
    "one_weight_per_channel": Expected(("BN504",)),
    "bn_of_steps_behind_a_linear_layer": Expected(("BN214",)),
    "bn_of_steps_behind_a_recurrent_layer": Expected(("BN214",)),
    "bn_of_steps_behind_attention": Expected(("BN214",)),
    # edits after the training
    "averaged_weights": _STALE,
    "moving_average_without_buffers": _NEVER,
    "pruned": _STALE,
    "scaled_convolution": _STALE,
    "quantised_to_three_bits": _STALE,
    "merged_adapter": _STALE,
    "buffers_of_another_checkpoint": _STALE,
    "permuted_buffers": _STALE,
    "permuted_buffers_without_train_data": Expected(("BN401", "BN301"), "staleness or shift"),
    "reset_buffers": _NEVER,
    "partial_load": _NEVER,
    "one_corrupted_layer": _STALE,
    "variances_of_twice_the_data": _STALE,
    "recalibrated_on_one_class": _STALE,
    "recalibrated_on_one_batch_of_four": _STALE,
    "new_head_on_an_old_body": Expected(("BN112",)),
    "negative_variance": Expected(("BN102",)),
    "filter_pruned_to_nothing": Expected(("BN113",)),
    "zero_variance_beside_pruned_filters": Expected(("BN113",)),
    "nan_in_a_weight": Expected(("BN103",)),
    "dead_channels": Expected(("BN108",)),
    "denormal_weights": Expected(("BN114",)),
    # ports between frameworks
    "mean_and_variance_exchanged": Expected(("BN304",), "staleness"),
    "standard_deviation_for_variance": Expected(("BN304",), "staleness"),
    "inverse_standard_deviation": Expected(("BN304",), "staleness"),
    "exchanged_color_channels": _EXCHANGED,
    "exchanged_color_channels_without_train_data": _EXCHANGED,
    # the inputs
    "missing_normalisation": _SHIFT,
    "pixels_up_to_255": _SHIFT,
    "inverted_images": _SHIFT,
    "noise": _SHIFT,
    "low_contrast": _SHIFT,
    "augmented_in_training_only": _SHIFT,
    "padding_in_the_statistics": _SHIFT,
    "padded_sequences": Expected(("BN404",), "shift"),
    "padded_sequences_with_lengths": Expected(("BN404",)),
    "padded_tokens_with_an_attention_mask": Expected(("BN404",)),
    "images_padded_to_the_largest": Expected(("BN404",)),
    "missing_normalisation_without_train_data": Expected(("BN401", "BN301"), "staleness or shift"),
    "tiny_inputs": Expected(("BN503",)),
    "eps_of_another_framework": Expected(("BN503", "BN106")),
    "time_stamps": Expected(("BN502", "BN111")),
    "overflowing_inputs": Expected(("BN501",)),
    "nearly_constant_pixels": Expected(("BN107",)),
    "sensor_that_was_off": Expected(("BN107",)),
    "mean_of_a_hundred_standard_deviations": Expected(("BN110",)),
    "variance_beyond_float16": Expected(("BN110",)),
    # real networks from $BNLAB_DATA
    "mnist_without_normalisation": _SHIFT,
    "mnist_buffers_of_another_run": _STALE,
    "resnet20_one_corrupted_layer": _STALE,
    "resnet20_sorted_loader": Expected(("BN403",)),
}

HEALTHY: tuple[str, ...] = (
    "cnn",
    "cnn_batches_of_8",
    "cnn_batches_of_16",
    "cnn_batches_of_128",
    "cnn_momentum_001",
    "cnn_cumulative_statistics",
    "cnn_constant_learning_rate",
    "cnn_eval_mode",
    "cnn_without_train_data",
    "cnn_small_evaluation_set",
    "cnn_sgd_with_weight_decay",
    "cnn_without_affine",
    "cnn_augmented",
    "cnn_channels_last",
    "cnn_float64",
    "cnn_autocast",
    "cnn_trained_long",
    "cnn_ragged_batches",
    "mlp",
    "mlp_batches_of_16",
    "mlp_ragged_batch_of_one",
    "resnet",
    "resnet_zero_gamma",
    "resnet_frozen",
    "resnet_frozen_class",
    "train_passes_its_mode",
    "frozen_teacher_in_a_list",
    "subclass_with_its_own_forward",
    "frozen_on_purpose",
    "one_bn_per_time_step",
    "point_clouds_in_batches_of_32",
    "single_samples_at_inference",
    "evaluated_in_pairs",
    "preact",
    "mobilenet",
    "densenet",
    "inception",
    "cnn3d",
    "sequence",
    "gated",
    "tanh",
    "mixed_with_group_norm",
    "images_of_one_size_per_batch",
    "sequences_of_one_length_per_batch",
    "tokens_of_one_length_per_batch",
    "padded_sequences_with_masked_layers",
    "curves_with_a_saturated_end",
    "dropout_after_the_last_bn",
    "averaged_and_recalibrated",
    "pruned_and_recalibrated",
    "three_domains_mixed_in_each_batch",
    "five_domains_mixed_in_each_batch",
    "sensors_that_follow_one_quantity",
    "pruned_on_purpose",
    "pruned_on_purpose_and_fine_tuned",
    "pruned_depthwise_filters",
    "ported_with_biased_variances",
    "ported_in_half_precision",
    "color_images",
    "color_images_in_any_order",
    "contrast_varied_in_training",
    "few_updates_on_standardised_features",
    "features_in_different_units",
    "mean_of_twenty_standard_deviations",
    "sensor_with_a_weak_signal",
    "filters_divided_by_ten",
    "bnlab_batch_norm",
    "bnlab_ghost",
    "bnlab_renorm",
    "bn_of_features_behind_a_linear_layer",
    "bn_of_features_behind_a_recurrent_layer",
    "bn_of_features_behind_attention",
    "bn_of_channels_behind_a_linear_layer_over_time",
    "mnist",
    "resnet20",
)

TRUE_WARNINGS: dict[str, tuple[str, ...]] = {
    "mnist": ("BN107",),  # a channel with a variance of 2e-5 in both files: tests/real/test_networks.py
}
"""Warnings that are true of a healthy network, as an inspection by hand showed. They do not count."""
