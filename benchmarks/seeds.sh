#!/usr/bin/env bash
# The methods that need no language model over 5 seeds, l2m2 over 3, and a trained team on larger maps than its own.
# usage: benchmarks/seeds.sh [OUT] ; then: python benchmarks/seeds_table.py OUT > docs/results/seeds.md
set -euo pipefail
out=${1:-runs/seeds}
for seed in 0 1 2 3 4; do
  echelon compare --methods rule-goals flat-mappo random-goals --seed "$seed" --out "$out/warehouse-$seed"
  echelon evaluate "$out/warehouse-$seed/rule-goals" --env.size 50 --env.num-agents 8 --name transfer
done
for seed in 0 1 2; do
  echelon compare --methods l2m2 --seed "$seed" --out "$out/warehouse-$seed"
done
for env in repair search; do
  for seed in 0 1 2 3 4; do
    echelon compare --methods rule-goals flat-mappo --env "$env" --seed "$seed" --out "$out/$env-$seed"
  done
done
