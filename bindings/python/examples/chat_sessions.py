#!/usr/bin/env python3
"""Several chats with one model, whose keys and values share one small budget: a chat that is not spoken to leaves memory, and comes back
from the drive when it is.

    python3 bindings/python/examples/chat_sessions.py MODEL POOL [--sessions 3] [--turns 3] [--budget 256] [--ram 32]

MODEL is a folder or name that transformers opens, POOL a nvtier pool, which is made where there is none. Run it twice: the second time the
beginnings of all chats are there.
"""

import argparse
import os
import time

import torch
import transformers

import nvtier

QUESTIONS = [
    "What is the largest ocean?",
    "How deep is it?",
    "Which animals live at its bottom?",
    "Who went there first?",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pool")
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--budget", type=int, default=256, help="MiB in the pool for all chats")
    parser.add_argument("--ram", type=int, default=32, help="MiB of memory for all chats")
    parser.add_argument("--plan", default="auto", choices=["auto", "load", "compute"], help="what is done with what is stored")
    parser.add_argument("--dtype", default="auto", help="of the model: float32, bfloat16, ...; auto is what its files say")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    if not os.path.exists(args.pool):
        nvtier.format(args.pool)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    with nvtier.kv.Store(args.pool, "chat", budget=args.budget << 20, ram=args.ram << 20) as store:
        planner = nvtier.kv.Planner()
        users = [f"user-{index}" for index in range(args.sessions)]
        # A tenant each: nobody's blocks answer anybody else, whatever they ask.
        options = {"planner": planner, "plan": args.plan}
        caches = {user: nvtier.transformers.PrefixCache(model, store, tokenizer, tenant=user, **options) for user in users}
        chats = {user: [{"role": "system", "content": f"You talk to {user}. Answer in one sentence."}] for user in users}
        for turn in range(args.turns):
            for user, chat in chats.items():
                chat.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
                inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
                cache = caches[user]
                begun = time.monotonic()
                tokens = cache.generate(inputs["input_ids"], max_new_tokens=args.tokens, do_sample=False)
                answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                chat.append({"role": "assistant", "content": answer})
                last = cache.last
                print(
                    f"{user} turn {turn}: prompt {last['prompt_tokens']} tokens, {last['loaded_tokens']} loaded, {last['computed_tokens']} computed,"
                    f" {last['saved_tokens']} saved, {time.monotonic() - begun:.2f} s: {answer.strip()[:60]!r}"
                )
        stat = caches[users[0]].namespace().stat()
        print(f"store: {stat['blocks']} blocks, {stat['allocated_bytes'] >> 20} MiB of {stat['budget_bytes'] >> 20} MiB, {stat['evictions']} made room")


if __name__ == "__main__":
    main()
