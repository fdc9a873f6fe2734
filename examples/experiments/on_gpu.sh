#!/usr/bin/env bash
# What docs/language_models.md, docs/performance.md and docs/one_gpu.md want to know from a machine with a GPU, in one command:
#
#     bash examples/experiments/on_gpu.sh [FOLDER]
#
# Throughput and memory, the base models measured, and SCoRe beside naive reinforcement learning on short lists. What is finished is
# kept, and a training that was interrupted resumes: start it again. Variables to change it:
#
#     CODER, SMOLLM    models; by default from the Hub
#     SEEDS            of the trainings, "0 1 2" by default
#     LIMIT            problems of an evaluation, 500 by default
#     TRAIN            further options of each training, such as "--max_steps 4 --stage1_steps 2"
#     PARTS            "speed base train" by default
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-outputs/on_gpu}
CODER=${CODER:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
SMOLLM=${SMOLLM:-HuggingFaceTB/SmolLM2-135M-Instruct}
SEEDS=${SEEDS:-0 1 2}
LIMIT=${LIMIT:-500}
PARTS=${PARTS:-speed base train}
TASKS=examples/experiments/language_tasks.py
mkdir -p "$OUT"

evaluate() {  # FOLDER MODEL TASK TOKENS [OPTIONS..]
    local folder=$1 model=$2 task=$3 tokens=$4
    shift 4
    trl-score evaluate --model "$model" --task "$task" --max_completion_length "$tokens" --limit "$LIMIT" --dtype bfloat16 \
        --batch_size 128 --output_dir "$OUT/$folder" "$@"
}

train() {  # FOLDER [OPTIONS..]
    local folder=$1 resume=()
    shift
    if compgen -G "$OUT/$folder/checkpoint-*" > /dev/null; then resume=(--resume_from_checkpoint true); fi
    # shellcheck disable=SC2086
    trl-score train --config examples/experiments/lists_coder_gpu.yaml --model_name_or_path "$CODER" \
        --output_dir "$OUT/$folder" "$@" "${resume[@]}" ${TRAIN:-}
}

if [[ $PARTS == *speed* ]]; then
    python tests/benchmarks/memory.py | tee "$OUT/memory.txt"
    for size in 0.5b 1.5b; do
        python tests/benchmarks/step.py --model $size --batch 32 --lora | tee "$OUT/step_${size}_lora.txt"
        python tests/benchmarks/step.py --model $size --batch 32 --qlora | tee "$OUT/step_${size}_qlora.txt"
    done
fi

if [[ $PARTS == *base* ]]; then
    export HF_ALLOW_CODE_EVAL=1  # runs programs of the model, in the sandbox
    evaluate base/smollm2_facts "$SMOLLM" $TASKS:Facts 10
    evaluate base/coder_lists "$CODER" $TASKS:Lists 40
    for task in humaneval mbpp mbpp_repair; do
        evaluate base/coder_$task "$CODER" $task 512
    done
    for task in gsm8k math; do
        evaluate base/coder_$task "$CODER" $task 512
        evaluate base/coder_${task}_self_refine "$CODER" $task 512 --self_refine
    done
fi

if [[ $PARTS == *train* ]]; then
    for seed in $SEEDS; do
        train "score_$seed" --seed "$seed"
        train "naive_$seed" --seed "$seed" --stage1_steps 0 --alpha 0
        train "single_$seed" --seed "$seed" --stage1_steps 0 --alpha 0 --num_attempts 1 --num_attempts_eval 2
        for run in score naive single; do
            evaluate "eval_${run}_$seed" "$OUT/${run}_$seed" $TASKS:Lists 40
        done
    done
fi
