#!/usr/bin/env bash
# The methods that need no language model, over 5 seeds, and what a trained team does on larger maps.
# usage: benchmarks/seeds.sh [OUT]   (then: python benchmarks/seeds_table.py OUT)
set -euo pipefail
out=${1:-runs/seeds}
for env in warehouse repair search; do
  for seed in 0 1 2 3 4; do
    echelon compare --methods rule-goals flat-mappo random-goals --env "$env" --seed "$seed" --out "$out/$env-$seed"
  done
done
for seed in 0 1 2 3 4; do
  echelon evaluate "$out/warehouse-$seed/rule-goals" --env.size 50 --env.num-agents 8 --name transfer
done
