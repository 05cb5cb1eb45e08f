"""What importing costs and needs: no torch, no upstream spyx, lazy submodules."""

import subprocess
import sys
import textwrap
from importlib import metadata

import pytest


def run(code, **kwargs):
    program = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.run(program, capture_output=True, text=True, check=False, **kwargs)


def test_everything_but_torch_works_without_torch(tmp_path):
    result = run(f"""
        import sys
        sys.modules["torch"] = None
        import jax.numpy as jnp, numpy as np
        from safetensors.numpy import save_file
        import compat_torch, spyx, parity.compare
        from compat_torch.models.lti import S5
        layer = S5(3, 4, "zoh")
        save_file({{k: np.asarray(v) for k, v in layer.state_dict().items()}}, r"{tmp_path}/s5.safetensors")
        again = compat_torch.load(r"{tmp_path}/s5.safetensors", discretization="zoh")
        assert jnp.array_equal(again(jnp.ones((1, 5, 3))), layer(jnp.ones((1, 5, 3))))
        """)
    assert result.returncode == 0, result.stderr


def test_torch_is_not_imported_unasked():
    result = run("""
        import sys
        import compat_torch.models.lti, compat_torch.checkpoint, compat_torch.interop, spyx.ssm, parity.subjects
        assert "torch" not in sys.modules
        """)
    assert result.returncode == 0, result.stderr


def test_import_is_lazy():
    result = run("""
        import sys
        import compat_torch, compat_torch.doctor, parity, spyx
        assert not {"jax", "flax", "numpy"} & sys.modules.keys(), sys.modules.keys()
        assert "LRU" in dir(compat_torch) and "ssm" in dir(spyx)
        assert spyx.ssm.LRU and compat_torch.S5
        """)
    assert result.returncode == 0, result.stderr


def test_unknown_names_are_attribute_errors():
    import compat_torch
    import parity
    import spyx

    for module in (compat_torch, parity, spyx):
        with pytest.raises(AttributeError, match="nothing"):
            module.nothing  # noqa: B018


def test_comparing_modules_names_its_extra():
    result = run("import sys; sys.modules['torch'] = None; import parity; parity.assert_identical(None, None)")
    assert result.returncode == 1
    assert "pip install 'spyx-torch[torch]'" in result.stderr


def test_upstream_spyx_is_refused_with_the_way_out(tmp_path):
    info = tmp_path / "spyx-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spyx\nVersion: 1.0.0\n")
    result = run(f"import sys; sys.path.append(r'{tmp_path}'); import spyx")
    assert result.returncode == 1
    assert "ImportError: the distribution 'spyx' 1.0.0 is installed" in result.stderr
    assert "pip uninstall -y spyx" in result.stderr
    assert "pip install --force-reinstall --no-deps spyx-torch" in result.stderr
    result = run(f"""
        import sys; sys.path.append(r'{tmp_path}')
        from compat_torch.__main__ import app
        app(["doctor"])""")
    assert result.returncode == 1
    assert "fix: pip uninstall -y spyx" in result.stdout


@pytest.mark.parametrize(("module", "missing"), [("parity.__main__", "rich"), ("compat_torch.__main__", "typer")])
def test_the_command_lines_name_their_extra(module, missing):
    result = run(f"import sys; sys.modules['{missing}'] = None; import {module}")
    assert "pip install 'spyx-torch[cli]'" in result.stderr


def test_versions_agree():
    import compat_torch
    import spyx

    assert spyx.__version__ == compat_torch.__version__ == metadata.version("spyx-torch")
