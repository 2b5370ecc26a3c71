#!/usr/bin/env bash
# The main job end to end on two CPU cores, in minutes: a small LLaDA becomes a FlexMDM and plans paths in a maze.
# Everything is made anew under runs/demo; every command is shown as it runs. Started by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/demo
began=$SECONDS

show() { printf '\n$ %s\n' "$*"; }
run() { show "$@"; "$@"; }
chapter() { printf '\n== %s (%d s so far)\n' "$1" $((SECONDS - began)); }

rm -rf "$out"
mkdir -p "$out"

chapter "A small LLaDA in the released layout, and the maze"
run retrofit init $out/llada --layers 4 --d-model 128
run python -m retrofit.data.maze $out/maze --rows 40000
run retrofit preprocess $out/maze/mdm.jsonl --out $out/data/mdm --tokenizer $out/llada --template spans --max-length 64
run retrofit preprocess $out/maze/flexmdm.jsonl --out $out/data/flexmdm --tokenizer $out/llada --template spans --max-length 64

chapter "It learns the maze as a plain masked-diffusion model, LLaDA's own way"
run retrofit train recipes/demo/mdm.yaml

chapter "The retrofit: the same weights become a FlexMDM. Killed on the way, it goes on where it was"
show retrofit train recipes/demo/flexmdm.yaml
retrofit train recipes/demo/flexmdm.yaml &
job=$!
until [ -d $out/flexmdm/checkpoints/step-00000600 ]; do
  kill -0 $job 2>/dev/null || wait $job
  sleep 0.2
done
sleep 2
show kill -KILL $job
kill -KILL $job
wait $job 2>/dev/null || true
run retrofit train recipes/demo/flexmdm.yaml

chapter "The baseline: as many further steps for the MDM"
run retrofit train recipes/demo/mdm-more.yaml

chapter "Both are scored on 200 problems a level that neither has seen, and that chose no setting"
run retrofit evaluate $out/flexmdm --task maze --data $out/maze --steps 64 --temperature 0.5 --output $out/scores/flexmdm-64
run retrofit evaluate $out/flexmdm --task maze --data $out/maze --steps 128 --temperature 0.5 --output $out/scores/flexmdm-128
run retrofit evaluate $out/mdm-more --task maze --data $out/maze --output $out/scores/mdm
run python -m retrofit.viewing.maze $out/scores/flexmdm-64 $out/scores/flexmdm-128 $out/scores/mdm --out $out/pictures

cat <<TXT

What the table does not show: the MDM is hardly trained, has to copy its way-points out of a prompt and to guess where its
window ends; the FlexMDM has them in place. It says that the job works, not how far apart the two are at their best.

Made in $((SECONDS - began)) s:
  $out/llada         the LLaDA that it began with
  $out/maze, data    the task and its token stores
  $out/mdm, mdm-more the runs of the MDM
  $out/flexmdm       the run of the FlexMDM: log.jsonl, checkpoints, final
  $out/scores        every problem, output and verdict, with the settings that repeat them
  $out/pictures      solved, failed and growing paths

Try next:
  .venv/bin/retrofit generate $out/flexmdm --prefix 0 --suffix Z --steps 128 --temperature 0.5 --num 3
  .venv/bin/retrofit train recipes/demo/flexmdm.yaml --training.output_dir $out/scratch --model.init_from $out/llada
  .venv/bin/retrofit evaluate $out/flexmdm --task loss --data $out/data/flexmdm
TXT
