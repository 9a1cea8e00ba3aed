"""Golden values of `optimizer.rs`: three steps of AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) in float64.

f(w) = sum(w**3), learning rate 0.01, betas (0.9, 0.98), eps 1e-6, weight decay 0.1 (torch.optim.AdamW computes the same).
Run: python3 adamw.py
"""
import math

w, m, v = [1.0, -2.0, 0.5], [0.0] * 3, [0.0] * 3
for t in (1, 2, 3):
    for i in range(3):
        g = 3 * w[i] ** 2
        w[i] *= 1 - 0.01 * 0.1
        m[i] = 0.9 * m[i] + 0.1 * g
        v[i] = 0.98 * v[i] + 0.02 * g * g
        w[i] -= 0.01 * (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.98**t)) + 1e-6)
print(w)
