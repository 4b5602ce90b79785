"""The build of the kernels with scripts in the place of a compiler: their arguments, and the state after a failure."""

import os
import platform
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bnlab.kernels.native import build

MACROS = {
    "avx512": "__AVX512F__ __AVX512BW__ __AVX512VL__ __AVX512DQ__ __AVX2__ __FMA__ __F16C__",
    "avx2": "__AVX2__ __FMA__ __F16C__ __AVX512F__",
    "baseline": "__SSE2__ __AVX2__",
}

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="sets of instructions of x86")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Install a script as the compiler. It records its arguments, creates its output and runs `lines`."""
    calls = tmp_path / "calls"

    def install(*lines: str) -> Path:
        script = tmp_path / "cxx"
        script.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> {calls}\n'
            + "\n".join(lines)
            + '\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo object > "$2"; shift; done\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("CXX", str(script))
        return calls

    return install


def macros_of(name: str) -> str:
    defined = "".join(f"#define {macro} 1\\n" for macro in MACROS[name].split())
    return f"case \"$*\" in *-march=native*) printf '{defined}'; exit 0;; esac"


@x86
@pytest.mark.parametrize("name", MACROS)
def test_the_set_is_the_best_whose_instructions_are_all_there(compiler, name):
    compiler(macros_of(name))
    assert build.machine_set(os.environ["CXX"]) == name


def test_the_real_compiler_names_a_set():
    if build.compiler() is None:
        pytest.skip("there is no compiler")
    assert build.machine_set(build.compiler()) in build.SETS


@x86
def test_only_the_set_of_this_machine_is_compiled_and_every_file_is_reported(compiler, tmp_path):
    calls, lines = compiler(macros_of("avx2")), []
    output = tmp_path / "library.so"
    assert build.build(output, every=False, report=lines.append) == ("avx2",)
    assert output.read_text() == "object\n"
    assert lines == [
        "compiling kernels for avx2: 5 files",
        *(f"compiling kernels for avx2: {n} of 5" for n in range(1, 6)),
    ]
    arguments = calls.read_text()
    assert arguments.count("-DBNLAB_ISA=avx2") == len(build.PARTS)
    assert "-DBNLAB_WITH_AVX2" in arguments
    assert "AVX512" not in arguments
    assert not list(tmp_path.glob(".build-*"))


@x86
def test_every_set_is_compiled_and_the_plainest_is_linked_first(compiler, tmp_path):
    calls = compiler()
    assert build.build(tmp_path / "library.so", every=True, report=str) == tuple(build.SETS)
    linked = next(
        line for line in calls.read_text().splitlines() if "baseline-forward.cpp.o" in line and "-shared" in line
    )
    places = [linked.index(f"/{name}") for name in ("dispatch.o", "baseline-", "avx2-", "avx512-")]
    assert places == sorted(places)


def test_without_a_compiler_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler: install g\+\+ or clang\+\+, or set CXX"):
        build.build(tmp_path / "library.so", every=False, report=str)


def test_a_compiler_that_refuses_leaves_the_library_that_was_there(compiler, tmp_path):
    compiler('case "$*" in *forward.cpp*) echo "no such flag" >&2; exit 1;; esac')
    output = tmp_path / "library.so"
    output.write_text("the library that was there")
    with pytest.raises(RuntimeError, match=r"failed: no such flag"):
        build.build(output, every=False, report=str)
    assert output.read_text() == "the library that was there"
    assert not list(tmp_path.glob(".build-*"))


def test_it_is_loaded_without_the_package_as_the_hook_of_the_wheel_does():
    """The hook runs where torch is not installed."""
    program = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        f"assert callable(runpy.run_path({str(Path(build.__file__))!r})['build'])\n"
    )
    subprocess.run([sys.executable, "-I", "-c", program], check=True)
    assert runpy.run_path(str(Path(build.__file__)))["SETS"] == build.SETS


def test_the_command_says_why_nothing_is_built(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main([]) == 1
    assert capsys.readouterr().err.startswith("The native kernels are not built: there is no C++ compiler")
