"""Float64 loops for spiking neurons, one time step, one row and one unit at a time.

`spike` maps the membrane potential minus the threshold to the output; a smooth one makes finite differences possible.
Each function returns (outputs (T, B, n), last state (B, n) or (B, 2 n), the smallest |potential - threshold| met).
"""

import numpy as np


def step_function(excess):
    return 1.0 if excess > 0 else 0.0


class Units:
    """Loops over rows and units; keeps the margin to the threshold."""

    def __init__(self, x, spike):
        self.x, self.spike, self.margin = np.asarray(x, np.float64), spike, np.inf
        self.T, self.B, self.n = self.x.shape
        self.out = np.zeros(self.x.shape)

    def fire(self, excess):
        self.margin = min(self.margin, abs(excess))
        return self.spike(excess)

    def result(self, *state):
        return self.out, np.concatenate(state, -1), self.margin


def unitwise(value, n):
    return np.broadcast_to(np.asarray(value, np.float64), (n,))


def integrate_and_fire(x, beta=1.0, w=None, threshold=1.0, spike=step_function):
    u = Units(x, spike)
    beta, theta = np.clip(unitwise(beta, u.n), 0, 1), unitwise(threshold, u.n)
    V = np.zeros((u.B, u.n))
    for t in range(u.T):
        for b in range(u.B):
            s = np.array([u.fire(V[b, i] - theta[i]) for i in range(u.n)])
            for i in range(u.n):
                back = 0.0 if w is None else sum(s[j] * w[j, i] for j in range(u.n))
                V[b, i] = beta[i] * V[b, i] + u.x[t, b, i] + back - s[i] * theta[i]
            u.out[t, b] = s
    return u.result(V)


def adaptive(x, beta, gamma, threshold=1.0, spike=step_function):
    u = Units(x, spike)
    beta, gamma = (np.clip(unitwise(v, u.n), 0, 1) for v in (beta, gamma))
    V, A = np.zeros((2, u.B, u.n))
    for t in range(u.T):
        for b in range(u.B):
            for i in range(u.n):
                theta = threshold + A[b, i]
                s = u.fire(V[b, i] - theta)
                V[b, i] = beta[i] * V[b, i] + u.x[t, b, i] - s * theta
                A[b, i] = gamma[i] * A[b, i] + (1 - gamma[i]) * s
                u.out[t, b, i] = s
    return u.result(V, A)


def current_based(x, alpha, beta, w=None, threshold=1.0, spike=step_function):
    u = Units(x, spike)
    alpha, beta = (np.clip(unitwise(v, u.n), 0, 1) for v in (alpha, beta))
    V, current = np.zeros((2, u.B, u.n))
    for t in range(u.T):
        for b in range(u.B):
            s = np.array([u.fire(V[b, i] - threshold) for i in range(u.n)])
            for i in range(u.n):
                back = 0.0 if w is None else sum(s[j] * w[j, i] for j in range(u.n))
                current[b, i] = alpha[i] * current[b, i] + u.x[t, b, i] + back
                V[b, i] = beta[i] * (V[b, i] - s[i] * threshold) + current[b, i]
            u.out[t, b] = s
    return u.result(V, current)


def leaky(x, beta, threshold=None, spike=step_function):
    """V itself without a threshold, else the spikes of V after the input; no reset."""
    u = Units(x, spike)
    beta = np.clip(unitwise(beta, u.n), 0, 1)
    V = np.zeros((u.B, u.n))
    for t in range(u.T):
        for b in range(u.B):
            for i in range(u.n):
                V[b, i] = beta[i] * V[b, i] + u.x[t, b, i]
                u.out[t, b, i] = V[b, i] if threshold is None else u.fire(V[b, i] - threshold)
    return u.result(V)
