"""Every algorithm in plain torch, as its definition says, importing nothing of the package.

A reference goes through the rounds with the clients that took part and leaves the merged model in `model`, and what
clients keep of their own in `own`. Keys are those that travel: ``<layer>.lora_A`` and so on. What is drawn from seeds
(fresh factors) is handed in.
"""

import torch
from torch.func import functional_call
from torch.nn import functional


def matrix(tensor):
    return tensor.reshape(len(tensor), -1)


def product(values, layer, like, names=("lora_A", "lora_B")):
    a, b = (values[f"{layer}.{name}"] for name in names)
    return (b.reshape(len(b), -1) @ matrix(a)).reshape(like.shape)


def best_pair(layer, weight, rank):
    """``B A`` nearest to a weight: ``U sqrt(S)``, ``sqrt(S) V^T``."""
    u, s, vh = torch.linalg.svd(matrix(weight), full_matrices=False)
    root, kernel = s[:rank].sqrt(), (1,) * (weight.dim() - 2)
    a = (root[:, None] * vh[:rank]).reshape(rank, *weight.shape[1:])
    return {f"{layer}.lora_A": a, f"{layer}.lora_B": (u[:, :rank] * root).reshape(len(weight), rank, *kernel)}


def mean(shares, all_values):
    return {key: sum(p * one[key] for p, one in zip(shares, all_values, strict=True)) for key in all_values[0]}


class Reference:
    """FedLoRU: ``A, B, dense <- sum_k p_k (...)``; every ``tau`` rounds ``W <- W + s B A``. Without layers, FedAvg.

    ``fresh(draw, rank)`` gives the factors as drawn; ``drawn`` the clients of each round; ``data`` a client's samples.
    """

    def __init__(self, net, layers, drawn, data, fresh, *, rate, steps, scale=1.0, tau=0, keep=False, **more):
        self.net, self.layers, self.drawn, self.data, self.fresh = net, layers, drawn, data, fresh
        self.rate, self.steps, self.scale, self.tau, self.keep, self.more = rate, steps, scale, tau, keep, more
        self.state = net().state_dict()
        self.weights = [f"{layer}.weight" for layer in layers]
        self.dense = [name for name, _ in net().named_parameters() if name not in self.weights]
        self.draw, self.round, self.own, self.c, self.c_of = 0, 0, {}, {}, {}
        self.sums, self.examples = {}, {}
        self.begin()

    def begin(self):
        self.factors = self.fresh(0, None) if self.layers else {}

    def run(self):
        for server_round, clients in sorted(self.drawn.items()):
            self.round = server_round
            examples = [len(self.data(client)[1]) for client in clients]
            shares = [count / sum(examples) for count in examples]
            replies = [self.client(client) for client in clients]
            statistics = mean(shares, [reply.pop("statistics") for reply in replies])
            self.update_control(clients, examples)
            self.settle(shares, replies)
            self.state |= statistics
            if self.tau and self.round % self.tau == 0:
                self.accumulate()
        return self

    # --- client ---

    def rank(self, client):
        return self.more["ranks"][client] if "ranks" in self.more else None

    def start(self, client):
        return {**self.factors, **{key: self.state[key] for key in self.dense}}

    def trained(self, client):
        return [*self.factors, *self.dense]

    def effective(self, values):
        return {w: self.state[w] + self.scale * product(values, w[:-7], self.state[w]) for w in self.weights}

    def client(self, client):
        return self.descend(client, self.start(client), self.trained(client), self.steps)

    def descend(self, client, start, keys, steps, *, global_model=True):
        """Plain SGD of the cross-entropy, with FedProx's and SCAFFOLD's terms."""
        mu, scaffold = self.more.get("mu", 0.0) * global_model, self.more.get("total") and global_model
        inputs, labels = self.data(client)
        model = self.net()
        model.load_state_dict(self.state)
        if "statistics" in start:
            model.load_state_dict(start["statistics"], strict=False)
        values = {key: value.clone() for key, value in start.items() if key != "statistics"}
        zero = {key: torch.zeros_like(values[key]) for key in keys}
        c, c_k = {**zero, **self.c}, {**zero, **self.c_of.get(client, {})}
        for _ in range(steps):
            live = {key: value.clone().requires_grad_(key in keys) for key, value in values.items()}
            parameters = {**{key: live[key] for key in self.dense}, **self.effective(live)}
            loss = functional.cross_entropy(functional_call(model, parameters, (inputs,)), labels)
            for key, gradient in zip(keys, torch.autograd.grad(loss, [live[key] for key in keys]), strict=True):
                step = gradient + mu * (values[key] - start[key]) + (c[key] - c_k[key] if scaffold else 0.0)
                values[key] = values[key] - self.rate * step
        if scaffold:  # option II
            new = {k: c_k[k] - c[k] + (start[k] - values[k]) / (steps * self.rate) for k in keys}
            self.changes = [*getattr(self, "changes", []), {key: new[key] - c_k[key] for key in keys}]
            self.c_of[client] = {**self.c_of.get(client, {}), **new}
        values["statistics"] = {key: value for key, value in model.state_dict().items() if "running" in key}
        return values

    # --- server ---

    def settle(self, shares, replies):
        averaged = self.step(mean(shares, [{k: reply[k] for k in (*self.factors, *self.dense)} for reply in replies]))
        self.factors = {key: averaged[key] for key in self.factors}
        self.state |= {key: averaged[key] for key in self.dense}

    def step(self, averaged):
        optimiser = self.more.get("server")
        before = {**self.factors, **{key: self.state[key] for key in self.dense}}
        return optimiser.step(self.round, before, averaged) if optimiser else averaged

    def accumulate(self):
        self.state |= self.effective(self.factors)
        if not self.keep:
            self.restart()

    def restart(self):
        self.draw += 1
        self.factors = {key: value for key, value in self.fresh(self.draw, None).items() if key in self.factors}
        for of in (self.c, self.sums, *self.c_of.values()):
            for key in self.factors:
                of.pop(key, None)
        if self.more.get("server"):
            self.more["server"].forget(self.factors)

    def update_control(self, clients, examples):
        """``c = sum_k n_k c_k / sum_k n_k``; those not seen yet have zero, and the mean number of examples."""
        if not self.more.get("total"):
            return
        self.examples |= dict(zip(clients, examples, strict=True))
        for change, count in zip(self.changes, examples, strict=True):
            for key, value in change.items():
                self.sums[key] = self.sums.get(key, 0.0) + count * value
        whole = self.more["total"] * sum(self.examples.values()) / len(self.examples)
        self.c = {key: value / whole for key, value in self.sums.items()}
        self.changes = []

    @property
    def model(self):
        return {**self.state, **self.effective(self.factors)}


class FrozenA(Reference):
    """FFA-LoRA and one-sided FedLoRU: ``A`` is drawn, ``B`` trained."""

    def trained(self, client):
        return [key for key in super().trained(client) if not key.endswith("lora_A")]


class RoLoRA(Reference):
    """``B`` in the first round of a cycle, then ``A``, and so on."""

    def trained(self, client):
        frozen = "lora_A" if (self.round - 1) % (self.tau or 10**9) % 2 == 0 else "lora_B"
        return [key for key in super().trained(client) if not key.endswith(frozen)]


class Hadamard(Reference):
    """``W + s (w1_a w1_b) * (w2_a w2_b)``."""

    def effective(self, values):
        def hada(layer):
            w1_a, w1_b, w2_a, w2_b = (values[f"{layer}.hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return (w1_a @ w1_b) * (w2_a @ w2_b)

        return {w: self.state[w] + self.scale * hada(w[:-7]).reshape(self.state[w].shape) for w in self.weights}


class FLoRA(Reference):
    """``W <- W + s sum_k p_k B_k A_k`` every round, from fresh factors of each client's rank."""

    def start(self, client):
        return {**super().start(client), **self.fresh(self.draw, self.rank(client))}

    def settle(self, shares, replies):
        for w in self.weights:
            gained = sum(p * product(r, w[:-7], self.state[w]) for p, r in zip(shares, replies, strict=True))
            self.state[w] = self.state[w] + self.scale * gained
        self.state |= mean(shares, [{key: reply[key] for key in self.dense} for reply in replies])
        self.restart()


class FedEx(Reference):
    """The mean of the factors, and ``W <- W + s (mean(B A) - mean(B) mean(A))``."""

    def settle(self, shares, replies):
        super().settle(shares, replies)
        for w in self.weights:
            exact = sum(p * product(r, w[:-7], self.state[w]) for p, r in zip(shares, replies, strict=True))
            self.state[w] = self.state[w] + self.scale * (exact - product(self.factors, w[:-7], exact))


class FlexLoRA(Reference):
    """The server holds ``D = sum_k p_k B_k A_k``; clients get its best pair of their rank."""

    def begin(self):
        self.factors, self.d = {}, None

    def start(self, client):
        pairs = self.fresh(0, self.rank(client))
        for w in self.weights if self.d is not None else ():
            pairs |= best_pair(w[:-7], self.d[w], len(pairs[f"{w[:-7]}.lora_A"]))
        return {**pairs, **super().start(client)}

    def trained(self, client):
        return [*self.fresh(0, None), *self.dense]

    def settle(self, shares, replies):
        super().settle(shares, replies)
        products = [{w: product(reply, w[:-7], self.state[w]) for w in self.weights} for reply in replies]
        self.d = mean(shares, products)

    @property
    def model(self):
        return {**self.state, **{w: self.state[w] + self.scale * self.d[w] for w in self.weights}}


class FedHM(FlexLoRA):
    """The same of the whole weight: nothing lies beneath the pair."""

    def begin(self):
        super().begin()
        self.d = {w: self.state[w] for w in self.weights}
        self.state |= {w: torch.zeros_like(self.state[w]) for w in self.weights}


class HetLoRA(Reference):
    """The first ``r_k`` rows of ``A`` and columns of ``B``; replies filled up with zeros."""

    def start(self, client):
        r = self.rank(client)
        cut = {key: value[:r] if key.endswith("A") else value[:, :r] for key, value in self.factors.items()}
        return {**super().start(client), **cut}

    def client(self, client):
        values = super().client(client)
        for key, whole in self.factors.items():
            small, values[key] = values[key], torch.zeros_like(whole)
            values[key][tuple(slice(0, size) for size in small.shape)] = small
        return values


class MFedLoRU(Reference):
    """A smaller client trains ``A + s_A A_d A_u``, ``B + s_B B_d B_u``.

    ``nested(round, client, layer, r_k)`` draws ``A_d`` and ``B_u``.
    """

    def client(self, client):
        r, small = self.rank(client), self.more["nested_scale"]
        whole = len(next(iter(self.factors.values())))
        if r >= whole:
            return super().client(client)
        start, keys = self.start(client), list(self.dense)
        for layer in self.layers:
            a, b = self.factors[f"{layer}.lora_A"], self.factors[f"{layer}.lora_B"]
            a_down, b_up = self.more["nested"](self.round, client, layer, r)
            start |= {f"{layer}.a_down": a_down, f"{layer}.a_up": torch.zeros(r, *a.shape[1:])}
            start |= {f"{layer}.b_down": torch.zeros(len(b), r), f"{layer}.b_up": b_up}
            keys += [f"{layer}.{part}" for part in ("a_down", "a_up", "b_down", "b_up")]
        values = self.descend(client, start, keys, self.steps)
        for layer in self.layers:
            values |= self.unnested(values, layer, small)
        return values

    def unnested(self, values, layer, small):
        a, b = values[f"{layer}.lora_A"], values[f"{layer}.lora_B"]
        a_down, a_up, b_down, b_up = (values[f"{layer}.{part}"] for part in ("a_down", "a_up", "b_down", "b_up"))
        a = a + small * (a_down @ matrix(a_up)).reshape(a.shape)
        return {f"{layer}.lora_A": a, f"{layer}.lora_B": b + small * (b_down @ b_up).reshape(b.shape)}

    def effective(self, values):
        for layer in self.layers:
            if f"{layer}.a_down" in values:
                values = {**values, **self.unnested(values, layer, self.more["nested_scale"])}
        return super().effective(values)


class PFedLoRU(Reference):
    """A personal pair beside the global one, trained after it, which stays; ``personal(client)`` draws it."""

    def effective(self, values):
        weights, names = super().effective(values), ("personal_A", "personal_B")
        if f"{self.layers[0]}.personal_A" not in values:
            return weights
        s = self.more["personal_scale"]
        return {w: value + s * product(values, w[:-7], value, names) for w, value in weights.items()}

    def client(self, client):
        own = self.own.get(client) or self.more["personal"](client)
        shared, personal = self.more["epochs"]
        values = self.descend(client, {**self.start(client), **own}, self.trained(client), shared)
        values = self.descend(client, values, list(own), personal, global_model=False)
        self.own[client] = {key: values[key] for key in own}
        return values


class FedSA(Reference):
    """``A`` is averaged, ``B`` stays; the model of all is ``W``."""

    def begin(self):
        self.b = {key: value for key, value in self.fresh(0, None).items() if key.endswith("lora_B")}
        self.factors = {key: value for key, value in self.fresh(0, None).items() if key.endswith("lora_A")}

    def client(self, client):
        own = self.own.get(client) or self.b
        start = {**self.start(client), **own}
        values = self.descend(client, start, [*self.factors, *self.b, *self.dense], self.steps)
        self.own[client] = {key: values[key] for key in own}
        return values

    @property
    def model(self):
        return dict(self.state)


class LowRankEF(Reference):
    """Full training; ``W <- W + sum_k p_k C(W_k - W + e_k)``, ``e_k`` what the compression ``C`` leaves out."""

    def begin(self):
        self.factors, self.dense = {}, [*self.weights, *self.dense]

    def effective(self, values):
        return {}

    def client(self, client):
        values, own = super().client(client), self.own.setdefault(client, {})
        for w in self.weights:
            update = values[w] - self.state[w] + own.get(w, 0.0)
            sent = product(best_pair(w[:-7], update, self.more["rank"]), w[:-7], update)
            values[w], own[w] = self.state[w] + sent, update - sent
        return values


class Momentum:
    """FedAvgM: ``v <- beta v + mean - w``, ``w <- w + eta v``."""

    def __init__(self, eta, beta):
        self.eta, self.beta, self.v = eta, beta, {}

    def step(self, server_round, before, averaged):
        for key, w in before.items():
            self.v[key] = self.beta * self.v.get(key, torch.zeros_like(w)) + averaged[key] - w
        return {key: w + self.eta * self.v[key] for key, w in before.items()}

    def forget(self, keys):
        for key in keys:
            self.v.pop(key, None)


class Adam:
    """FedAdam, bias-corrected as Flower does it: with the round plus one."""

    def __init__(self, eta, beta_1, beta_2, tau):
        self.eta, self.beta_1, self.beta_2, self.tau, self.m, self.v = eta, beta_1, beta_2, tau, {}, {}

    def step(self, server_round, before, averaged):
        t = server_round + 1
        eta = self.eta * (1 - self.beta_2**t) ** 0.5 / (1 - self.beta_1**t)
        after = {}
        for key, w in before.items():
            gained, zero = averaged[key] - w, torch.zeros_like(w)
            self.m[key] = self.beta_1 * self.m.get(key, zero) + (1 - self.beta_1) * gained
            self.v[key] = self.beta_2 * self.v.get(key, zero) + (1 - self.beta_2) * gained**2
            after[key] = w + eta * self.m[key] / (self.v[key].sqrt() + self.tau)
        return after

    def forget(self, keys):
        for key in keys:
            self.m.pop(key, None)
            self.v.pop(key, None)
