"""No source calls what would run code that a file holds."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
REVIEWED = {
    ("teacher_dump/ray_engine.py", "pickle.loads"),
    ("student/evaluation/hugging_face.py", "AutoModelForCausalLM.from_pretrained"),
}
"""What a driver of ours has just pickled for its own worker; code of a model where the user says --trust_remote_code
(tests/unit/test_hugging_face.py)."""


def unsafe_calls(path: Path) -> set[str]:
    """Calls in a source that would run what a file says."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module, _, last = name.rpartition(".")
        if module in MODULES and last in ("load", "loads", "Unpickler", "open") or name in ("eval", "exec"):
            found.add(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.add(name)
        if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            found.add(name)
        if module == "yaml" and last in ("load", "load_all", "unsafe_load", "full_load"):
            found.add(name)
        if options.get("trust_remote_code", "False") != "False" or options.get("weights_only", "True") != "True":
            found.add(name)
        if last == "from_pretrained" and "Model" in module and options.get("use_safetensors") != "True":
            found.add(name)
    return found


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    sources = [
        p for folder in ("pipeline", "teacher_dump", "student") for p in sorted((REPOSITORY / folder).rglob("*.py"))
    ]
    assert len(sources) > 60
    found = {(str(p.relative_to(REPOSITORY)), call) for p in sources for call in unsafe_calls(p)}
    assert found - REVIEWED == set()
    named = {"pickle", "yaml", "torch", "np"}  # imported under these names, which the search goes by
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in {*MODULES, "yaml"}:
                raise AssertionError(f"{path} imports from {node.module}: the search above would not see its calls")
            if isinstance(node, ast.Import):
                assert all(a.asname in (None, *named) for a in node.names if a.name in {*MODULES, "yaml", "torch"}), (
                    path
                )


def test_the_search_sees_every_unsafe_call(tmp_path: Path) -> None:
    lines = {
        "pickle.loads(x)": True,
        "pickle.dumps(x)": False,
        "torch.load(p)": True,
        "torch.load(p, weights_only=flag)": True,
        "torch.load(p, weights_only=True)": False,
        "np.load(p, allow_pickle=True)": True,
        "np.load(p)": False,
        "yaml.load(t, Loader=yaml.Loader)": True,
        "yaml.safe_load(t)": False,
        "trainer.fit(m, weights_only=False)": True,
        "AutoModelForCausalLM.from_pretrained(p, use_safetensors=True, trust_remote_code=True)": True,
        "AutoModelForCausalLM.from_pretrained(p)": True,
        "eval(t)": True,
        "model.eval()": False,
    }
    for line, unsafe in lines.items():
        (tmp_path / "a.py").write_text(line)
        assert bool(unsafe_calls(tmp_path / "a.py")) == unsafe, line
