import hashlib
import json
from pathlib import Path

from e2e_sae.data.stdlib_corpus import stdlib_documents, stdlib_part


def make_library(folder: Path, *modules: str) -> Path:
    for module in modules:
        path = folder / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {module}\n", encoding="utf-8")
    return folder


def test_the_running_librarys_own_source_is_a_document_under_its_dotted_name():
    documents = {document.name: document.text for document in stdlib_documents()}
    assert documents["json"] == Path(json.__file__).read_text(encoding="utf-8")
    assert "json.decoder" in documents
    assert "json.__init__" not in documents


def test_documents_are_sorted_by_name_and_names_are_unique():
    names = [document.name for document in stdlib_documents()]
    assert names == sorted(set(names))


def test_tests_installed_packages_and_generated_files_are_left_out(tmp_path: Path):
    root = make_library(
        tmp_path,
        "os.py",
        "email/__init__.py",
        "email/policy.py",
        "test/test_os.py",
        "unittest/case.py",
        "sqlite3/tests/x.py",
        "idlelib/idle_test/y.py",
        "site-packages/torch/__init__.py",
        "dist-packages/z.py",
        "os/__pycache__/os.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_.py",
    )
    assert [d.name for d in stdlib_documents(root=root)] == ["email", "email.policy", "os", "unittest.case"]


def test_a_file_without_text_is_no_document(tmp_path: Path):
    (tmp_path / "empty.py").write_text("\n")
    make_library(tmp_path, "full.py")
    assert [d.name for d in stdlib_documents(root=tmp_path)] == ["full"]


def test_train_and_eval_together_are_all_and_share_nothing():
    train = {d.name for d in stdlib_documents("train")}
    held_out = {d.name for d in stdlib_documents("eval")}
    assert train & held_out == set()
    assert train | held_out == {d.name for d in stdlib_documents("all")}
    assert 0.02 < len(held_out) / len(train | held_out) < 0.09


def test_the_part_follows_from_the_name_alone(tmp_path: Path):
    names = [f"module_{i}" for i in range(200)]
    expected = [n for n in names if int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) % 20 == 0]
    root = make_library(tmp_path, *(f"{n}.py" for n in names))
    assert [d.name for d in stdlib_documents("eval", root=root)] == sorted(expected)
    assert all(stdlib_part(n) == "eval" for n in expected)
