#!/usr/bin/env bash
# The whole path by its commands: text -> tokenizer -> store -> pretraining -> fine-tuning -> chat -> a number.
#
# Runs offline on a CPU in about half a minute: a model of a few hundred thousand parameters, text that comes with
# every Python, ten questions that it learns by heart. `moai quickstart` is the same path with a larger model.
#
#   bash examples/quickstart.sh [NEW_DIRECTORY]
set -euo pipefail

out=${1:-runs/example}
python=${PYTHON:-python}
moai() { "$python" -m moai_llm "$@"; } # `moai` itself, wherever Python finds the package
library=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
small=(data.seq_len=128 train.batch_tokens=1024 log.every=10)
mkdir -p "$out"

# 1. How text is cut into tokens. Folders, txt, md, py, jsonl, csv and parquet files are read.
moai tokenizer train "$library/json" "$library/email" --vocab-size 1024 --out "$out/tokenizer"
moai tokenizer show "$out/tokenizer" 'def parse(text):'

# 2. Text to token ids, once. Training only ever reads the store.
moai data prepare "$library/email" --tokenizer "$out/tokenizer" --out "$out/text"
moai data prepare "$library/json" --tokenizer "$out/tokenizer" --out "$out/held_out"

# 3. Pretraining: a preset and the keys to change. `moai recipes --tiny` lists the presets.
moai train moai-hybrid-moe-0.8b-tiny "${small[@]}" data.train="$out/text" data.valid="$out/held_out" eval.rows=null \
  train.steps=30 train.out="$out/pretrained"

# 4. Conversations: one JSON object a line. question/answer, messages, ShareGPT and Alpaca shapes are recognised.
cat >"$out/chats.jsonl" <<'CHATS'
{"question": "What is the capital of Korea?", "answer": "Seoul."}
{"question": "What is the capital of Japan?", "answer": "Tokyo."}
{"question": "What is the capital of France?", "answer": "Paris."}
{"question": "What is the capital of Italy?", "answer": "Rome."}
{"question": "What is the capital of China?", "answer": "Beijing."}
{"question": "대한민국의 수도는 어디예요?", "answer": "서울이에요."}
{"question": "日本の首都はどこですか?", "answer": "東京です。"}
{"question": "中国的首都是哪里?", "answer": "北京。"}
{"question": "What is 2 + 2?", "answer": "4."}
{"question": "Hello!", "answer": "Hello, how can I help?"}
CHATS
moai data prepare "$out/chats.jsonl" --chat --tokenizer "$out/tokenizer" --out "$out/chats"

# 5. Fine-tuning is training from another start, on a store of conversations: only the answers are learned.
moai train moai-hybrid-moe-0.8b-tiny "${small[@]}" data.train="$out/chats" train.init_from="$out/pretrained" \
  train.steps=80 train.out="$out/chat" optim.lr=1e-2

# 6. Talk to it. Without the pipe it is a conversation in the terminal.
echo 'What is the capital of Korea?' | moai chat "$out/chat" --temperature 0 --max-new-tokens 16

# 7. Measure it: bits per byte compares models of different tokenizers.
moai eval perplexity "$out/pretrained" "$library/json/encoder.py"
