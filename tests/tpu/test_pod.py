"""The script that rents a TPU, against a recorded gcloud."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$RECORD"
case "$*" in
  *describe*) count=$(grep -c describe "$RECORD"); [ "$count" -lt 3 ] && echo PROVISIONING || echo "${LAST:-ACTIVE}" ;;
  *status-fails*) exit 1 ;;
esac
"""


@pytest.fixture
def pod(request, tmp_path):
    """Runs the script; returns the process and what gcloud was called with."""
    fake = tmp_path / "bin/gcloud"
    fake.parent.mkdir()
    fake.write_text(GCLOUD)
    fake.chmod(0o755)
    record = tmp_path / "record"

    def run(*words, **variables):
        environment = os.environ | variables
        environment |= {"PATH": f"{fake.parent}:{os.environ['PATH']}", "RECORD": str(record), "POLL_SECONDS": "0"}
        script = request.config.rootpath / "tpu/pod.sh"
        ran = subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True)
        calls = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return ran, calls

    return run


VM, QUEUE = "compute tpus tpu-vm", "compute tpus queued-resources"


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("create", f"{VM} create flax-diffusion --accelerator-type v5litepod-4 --version v2-alpha-tpuv5-lite"),
        (
            "--name a --zone z --project p --type v6e-8 --spot create",
            f"{VM} create a --zone z --project p --accelerator-type v6e-8 --version v2-alpha-tpuv6e --spot",
        ),
        (
            "--queued --type v5p-8 create",
            f"{QUEUE} create flax-diffusion --node-id flax-diffusion --accelerator-type v5p-8 "
            "--runtime-version v2-alpha-tpuv5",
        ),
        ("--type v4-8 --version mine create", f"{VM} create flax-diffusion --accelerator-type v4-8 --version mine"),
        ("log", f"{VM} ssh flax-diffusion --worker 0 --command tail -n 50 -f train.log"),
        ("stop", f"{VM} ssh flax-diffusion --worker all --command kill -TERM $(cat train.pid)"),
        ("fetch gs://b/runs/a here", "storage cp --recursive gs://b/runs/a here"),
        ("fetch runs/a here", f"{VM} scp --recurse flax-diffusion:runs/a here --worker 0"),
        ("--zone z delete", f"{VM} delete flax-diffusion --zone z --quiet"),
        ("--queued delete", f"{QUEUE} delete flax-diffusion --force --quiet"),
    ],
)
def test_one_call_each(pod, words, call):
    ran, calls = pod(*words.split())
    assert (ran.returncode, calls) == (0, [call])
    dry, none = pod("--dry-run", *words.split())
    assert none == []
    assert dry.stdout.split()[:4] == ["gcloud", *call.split()[:3]]


def test_start_goes_on_from_the_last_checkpoint(pod):
    _, (call,) = pod("start", "--", "dreambooth", "--instance_prompt", "a sks dog")
    assert " dreambooth --instance_prompt a\\ sks\\ dog --resume_from_checkpoint latest >" in call
    _, (call,) = pod("start", "--", "unconditional", "--resume_from_checkpoint", "checkpoint-5")
    assert "checkpoint-5 >" in call
    assert "latest" not in call


def test_install_copies_the_checkout(pod):
    ran, calls = pod("install")
    assert ran.returncode == 0
    assert calls[0].startswith(f"{VM} scp ")
    assert calls[0].endswith("flax-diffusion.tgz flax-diffusion: --worker all")
    assert "uv venv -q --clear --seed --python 3.11 venv && venv/bin/pip install" in calls[1]
    assert "pip install -q -c flax-diffusion/constraints.txt -e './flax-diffusion[tpu]'" in calls[1]


def test_wait(pod):
    ran, calls = pod("--queued", "wait")
    assert ran.stdout.split() == ["PROVISIONING", "PROVISIONING", "ACTIVE"]
    assert len(calls) == 3
    ran, _ = pod("--queued", "wait", LAST="FAILED")
    assert (ran.returncode, ran.stderr) == (
        2,
        "error: the request for flax-diffusion is FAILED: delete it, and create again\n",
    )


@pytest.mark.parametrize(
    ("kind", "spot", "topology", "hosts", "chips"),
    [("v5litepod-16", True, "4x4", 4, 4), ("v6e-1", False, "1x1", 1, 1), ("v4-64", False, "2x4x4", 8, 4)],
)
def test_a_jobset_for_gke(pod, kind, spot, topology, hosts, chips):
    prompt = 'a "sks" dog, \\o/'
    options = ["--type", kind, "--name", "run", *(["--spot"] if spot else [])]
    ran, calls = pod(*options, "jobset", "image:1", "--", "dreambooth", "--instance_prompt", prompt)
    assert (ran.returncode, ran.stderr, calls) == (0, "", [])
    made = yaml.safe_load(ran.stdout)
    assert made["metadata"] == {"name": "run"}
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    pod_spec = job["template"]["spec"]
    assert pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert ("cloud.google.com/gke-spot" in pod_spec["nodeSelector"]) == spot
    (container,) = pod_spec["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container["command"][3:] == ["dreambooth", "--instance_prompt", prompt, "--resume_from_checkpoint", "latest"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "no command"),
        ("fly", "unknown command fly"),
        ("--fast create", "unknown option --fast"),
        ("--name", "--name needs a value"),
        ("--type v3-8 create", "types known are v4-N"),
        ("jobset image", "jobset: give an image and what to train"),
        ("--type v5litepod-9 jobset image -- text_to_image", "has N chips, which are 1, 4, 8, 16, 32, 64, 128 or 256"),
        ("--type v4-256 jobset image -- text_to_image", "--type v4-256: not known to jobset"),
        ("--type v5litepod-3 --dry-run create", "--type v5litepod-3: v5litepod-N has N chips, which are 1, 4, 8"),
        ("--type v6e-2 --queued --dry-run create", "--type v6e-2: v6e-N has N chips"),
        ("--type v5p-4 create", "--type v5p-4: v5p-N has N cores, two a chip, which are a multiple of 8"),
        ("--type v4-x --version mine create", "--type v4-x: v4-N has N cores"),
        ("--type v5e-8 --dry-run create", "--type v5e-8: that is v5litepod-8"),
        ("start", "start: give what to train"),
        ("fetch a", "fetch: give the folder there and the one here"),
    ],
)
def test_mistakes(pod, words, says):
    ran, calls = pod(*words.split())
    assert ran.returncode == 2
    assert says in ran.stderr
    assert calls == []


@pytest.mark.parametrize("script", ["tpu/pod.sh", ".ci/run"])
def test_shellcheck(request, script):
    command = Path(sysconfig.get_path("scripts")) / "shellcheck"
    subprocess.run([command, request.config.rootpath / script], check=True)
