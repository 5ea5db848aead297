"""Shows the way from a launch on a cluster to a query, with the same commands on a small scale on this machine."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="From a cluster to a query", sql_output="pandas")

with app.setup:
    import subprocess
    import sys
    import tempfile

    import marimo as mo

    from collector import open_run


@app.cell(hide_code=True)
def _():
    mo.md("""
    # From a cluster to a query

    One command collects a run into a folder, and queries read the folder. The command is the same on a laptop and on a
    hundred GPUs; only the way to launch it differs. `cluster/README.md` has all details.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Launch

    On one machine, with a replica per GPU; Ray starts automatically:

    ```sh
    collector collect --out runs/olmoe --model allenai/OLMoE-1B-7B-0924 --data 'texts/*.jsonl' --label-column lang
    ```

    On a cluster that Ray launches in the cloud, whose nodes may come and go:

    ```sh
    ray up cluster/ray-cluster.yaml
    ray job submit --address http://127.0.0.1:8265 --no-wait -- \
        collector collect --out s3://BUCKET/runs/olmoe --model allenai/OLMoE-1B-7B-0924 \
        --data 's3://BUCKET/texts/*.jsonl' --label-column lang --device cuda --replicas 16
    ```

    On SLURM, with four nodes of eight GPUs:

    ```sh
    sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh --out /shared/runs/olmoe \
        --model allenai/OLMoE-1B-7B-0924 --data '/shared/texts/*.jsonl' --label-column lang
    ```

    In each case the documents are first divided into shards. Each replica takes one shard at a time, and a shard counts
    once its commit record exists. If a replica, node or driver is killed, only the shards in progress are lost: repeat
    **the same command** to resume.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## On a small scale

    This runs the demo model in two replicas on this machine's cores, over four shards.
    """)
    return


@app.cell
def _():
    given = mo.cli_args()
    scratch = tempfile.TemporaryDirectory()
    out = given.get("out") or f"{scratch.name}/run"

    def collector(*arguments):
        """Runs a command of the collector as in a terminal; returns its output."""
        done = subprocess.run(
            [sys.executable, "-m", "collector", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stdout)
        return done.stdout

    return collector, out


@app.cell
def _(collector, out):
    launch = ("collect", "--out", out, "--per-label", "4", "--docs-per-shard", "60", "--replicas", "2",
              "--cpus-per-replica", "1")  # fmt: skip
    first = collector(*launch)
    again = collector(*launch)
    run_folder = out  # makes the following cells wait for the run
    mo.vstack(
        [
            mo.plain_text(first),
            mo.md("Repeating the command finds every shard committed, and does nothing:"),
            mo.plain_text(again),
        ]
    )
    return again, first, run_folder


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Monitor and verify

    Anywhere with access to the folder or bucket, `collector status RUN --watch` follows the run, `collector verify RUN`
    re-reads all files and compares them with the commit records, and `collector status RUN --summary` writes a summary
    for a paper.
    """)
    return


@app.cell
def _(collector, run_folder):
    verified = collector("verify", run_folder)
    summary = collector("status", run_folder, "--summary")
    mo.vstack([mo.plain_text(verified), mo.md(summary)])
    return summary, verified


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Query

    In a terminal, `collector query RUN top_experts --layer 4`; in Python, the code below. A run on an object store is
    queried in place: `open_run("s3://BUCKET/runs/olmoe")`.
    """)
    return


@app.cell
def _(run_folder):
    run = open_run(run_folder)
    connection = run.connection
    favourites = run.query("top_experts", layer=4, labels=["eng_Latn", "kor_Hang"], n=3).df()
    favourites.round(3)
    return connection, favourites


@app.cell
def _(connection):
    shards = mo.sql(
        """
        select shard, count(*) as documents, sum(tokens)::bigint as tokens
        from documents
        group by shard
        order by shard
        """,
        engine=connection,
    )
    return (shards,)


@app.cell
def _(favourites, first, shards, verified):
    if mo.app_meta().mode == "script":
        print(first)
        print(verified)
        print(shards.to_string(index=False))
        print(favourites.to_string(index=False))
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Share

    ```sh
    collector export RUN routing-olmoe --to hf
    hf upload USER/routing-olmoe routing-olmoe --repo-type dataset
    ```

    The first command writes a dataset with its card for the Hugging Face hub (`docs/loading.md`). A run is as private
    as its text.
    """)
    return


if __name__ == "__main__":
    app.run()
