#!/usr/bin/env bash
# The whole tour at miniature size, about a minute on two cores: make data, let a model write the instructions, train on cached
# encodings, edit a benchmark, have it judged, look at the pages. No network, no GPU: the "vision-language model" is
# tests/fake_server.py, which speaks the protocol of vLLM, SGLang and OpenAI and fails in 30 % of its calls, as real ones may.
#
#     bash docs/tour.sh [FOLDER]        results in FOLDER (default runs/tour); open FOLDER/scores/report.html and study.html
#
# For the paper's size: an OBJect-3DIT folder for DATASET, a served Qwen3-VL for URL, --weights for the official files.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${1:-runs/tour}"
mkdir -p "$OUT"

# The server. Really: vllm serve Qwen/Qwen3-VL-32B-Instruct --tensor-parallel-size 2 --max-model-len 8192
PORT="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
python -m tests.fake_server --port "$PORT" --failures 0.3 --hang 3 &
trap 'kill %1' EXIT
VLM=(--url "http://127.0.0.1:$PORT/v1" --model fake --timeout 2 --cache "$OUT/calls.jsonl")

# Data. A made-up DATASET in OBJect-3DIT's layout, with its irregularities; and rendered scenes.
python -m tests.fake_objedit "$OUT/DATASET"
python data.py objedit --root "$OUT/DATASET" --task translate --split train --out "$OUT/objedit.jsonl" --reverse --instructions none
python data.py scenes --out "$OUT/scenes.jsonl" --count 24
python data.py scenes --out "$OUT/bench/benchmark.jsonl" --count 6 --split unseen

# Instructions: how many calls, then the calls. What is answered once is never asked again.
python data.py instruct "$OUT/objedit.jsonl" --out "$OUT/objedit_vlm.jsonl" "${VLM[@]}" --dry-run
python data.py instruct "$OUT/objedit.jsonl" --out "$OUT/objedit_vlm.jsonl" "${VLM[@]}"
python data.py check "$OUT/objedit_vlm.jsonl" --sheet "$OUT/objedit.png" || true  # it names the problems of the made-up pictures
python data.py check "$OUT/scenes.jsonl" --sheet "$OUT/scenes.png"

# Training, the encoders out of memory: a few steps, to see it run.
TRAIN=(--data "$OUT/scenes.jsonl" --steps 4 --batch 4 --cache "$OUT/cache" --resume)
python train.py --stage 1 "${TRAIN[@]}" --output "$OUT/stage1"
python train.py --stage 2 "${TRAIN[@]}" --output "$OUT/stage2" --checkpoint "$OUT/stage1"

# Editing, judging, looking. Any method's pictures can take part: one folder each, named by id.
python evaluate.py generate --benchmark "$OUT/bench" --output "$OUT/edits/shipped"
python evaluate.py generate --benchmark "$OUT/bench" --output "$OUT/edits/four_steps" --checkpoint "$OUT/stage2"
EDITS=(--benchmark "$OUT/bench" --outputs "shipped=$OUT/edits/shipped" "four_steps=$OUT/edits/four_steps")
python evaluate.py sanity --benchmark "$OUT/bench" "${VLM[@]}"
python evaluate.py score "${EDITS[@]}" --output "$OUT/scores" "${VLM[@]}"
python evaluate.py study "${EDITS[@]}" --output "$OUT/study.html" --count 6
