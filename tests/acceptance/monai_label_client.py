"""What 3D Slicer's plugin asks of a MONAI Label server, with checks; run by monai_label.sh."""

import argparse
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import requests
from PIL import Image

NAME = "diffboost_segmentation"
START_SECONDS = 300
TRAIN_SECONDS = 600
EPOCHS = 2
COMPLAINTS = ("Checkpoint keys don't match", "Traceback")


def wait_for_server(url: str) -> dict:
    """/info/ as soon as the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            return requests.get(f"{url}/info/", timeout=30).json()
        except requests.ConnectionError:
            time.sleep(2)
    raise TimeoutError(f"no answer of {url} in {START_SECONDS} s")


def infer(url: str, path: Path, answer: Path) -> np.ndarray:
    """Uploads a file and reads the label map that comes back."""
    with path.open("rb") as file:
        reply = requests.post(
            f"{url}/infer/{NAME}?output=image",
            data={"params": json.dumps({"device": "cpu"})},
            files={"file": (path.name, file)},
            timeout=TRAIN_SECONDS,
        )
    assert reply.status_code == 200, (path.name, reply.status_code, reply.text)
    answer.write_bytes(reply.content)
    if path.suffix == ".png":
        return np.asarray(Image.open(answer))
    source, served = nib.load(path), nib.load(answer)
    assert served.shape == source.shape, (served.shape, source.shape)
    assert np.allclose(served.affine, source.affine, atol=1e-4), (served.affine, source.affine)
    assert served.get_data_dtype() == np.uint8, served.get_data_dtype()
    return np.asarray(served.dataobj)


def check_inference(url: str, data: Path, expected: Path) -> None:
    """Every label map equals the one of monai.bundle run, voxel for voxel."""
    for path in sorted([*(data / "volumes").iterdir(), *(data / "pictures").iterdir()]):
        suffix = ".png" if path.suffix == ".png" else ".nii.gz"
        stem = path.name.removesuffix(suffix)
        served = infer(url, path, expected / f"{stem}_served{suffix}")
        written = expected / f"{stem}_seg{suffix}"
        wanted = Image.open(written) if suffix == ".png" else nib.load(written).dataobj
        wanted = np.asarray(wanted)
        assert served.dtype == wanted.dtype == np.uint8, (served.dtype, wanted.dtype)
        assert np.array_equal(served, wanted), f"{path.name}: {np.sum(served != wanted)} voxels"
        counted = np.bincount(served.ravel()).tolist()
        print(f"   {path.name}: {served.shape}, voxels a class {counted}, equal")
        assert len(counted) == 2, f"{path.name}: nothing was found"


def slicer_body(info: dict) -> dict:
    """All options of the trainer as Slicer posts them: of a list the first."""
    options = info["trainers"][NAME]["config"]
    body = {key: value[0] if isinstance(value, list) else value for key, value in options.items()}
    extra = {"train_batch_size": 1, "val_batch_size": 1}
    return {
        "model": NAME,
        **extra,
        **body,
        "device": "cpu",
        "max_epochs": EPOCHS,
        "val_split": 0.25,
    }


def train(url: str, body: dict, sync: bool) -> None:
    """One training; a second one, behind the server's back, is waited for."""
    flag = "true" if sync else "false"
    reply = requests.post(f"{url}/train/{NAME}?run_sync={flag}", json=body, timeout=TRAIN_SECONDS)
    assert reply.status_code == 200, (reply.status_code, reply.text)
    end = time.monotonic() + TRAIN_SECONDS
    status = reply.json().get("status", "DONE") if sync else "RUNNING"
    while not sync and status not in ("DONE", "ERROR") and time.monotonic() < end:
        time.sleep(3)
        status = requests.get(f"{url}/train/", timeout=60).json()["status"]
    assert status == "DONE", status


def check_training(url: str, body: dict, bundle: Path) -> None:
    """Weights land in models/model.pt with their lineage, synchronously and not."""
    model = bundle / "models" / "model.pt"
    for sync in (True, False):
        before = model.stat().st_mtime_ns
        train(url, body, sync)
        record = json.loads((bundle / "models" / "run.json").read_text())
        lineage = json.loads((bundle / "models" / "lineage.json").read_text())
        assert model.stat().st_mtime_ns > before, "models/model.pt is not newer"
        assert record["epochs"] == EPOCHS and record["arm"] == "baseline", record
        assert (len(lineage["cases"]), len(lineage["selection"])) == (3, 1), lineage
        assert len(lineage["ancestors"]) == 1, "what it began from is not in its lineage"
        print(f"   {'sync' if sync else 'async'}: {EPOCHS} epochs, models/model.pt is newer")
    names = sorted(path.name for path in (bundle / "models").glob("*.pt"))
    assert names == ["model.pt"], names


def main() -> None:
    """All checks in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", required=True)
    for name in ("data", "expected", "bundle", "log"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    url = f"http://127.0.0.1:{given.port}"
    info = wait_for_server(url)
    model = info["models"][NAME]
    metadata = json.loads((given.bundle / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    wanted = {name: int(number) for number, name in channels.items() if name != "background"}
    assert (model["labels"], model["dimension"]) == (wanted, 2), model
    print(f"   listed with labels {model['labels']}, dimension {model['dimension']}")
    check_inference(url, given.data, given.expected)
    check_training(url, slicer_body(info), given.bundle)
    infer(url, next((given.data / "volumes").iterdir()), given.expected / "after.nii.gz")
    log = given.log.read_text()
    assert "models/model.pt" in log
    for complaint in COMPLAINTS:
        assert complaint not in log, f"the server's log says {complaint!r}"
    print("   the log names models/model.pt and complains of nothing")


if __name__ == "__main__":
    main()
