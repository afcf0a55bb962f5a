"""PPO trainers that depart from Alg. 1: a parser's macro actions, the official code's choices."""
