"""Phrase structure of what the twins' policies write: a small treebank for each task, and the
parser that is read off it.

Every clause that a twin's grammar generates has its constituency tree here, in Penn Treebank
labels, with `{slot}` where one of the twin's values stands. The productions of these trees, each
weighted by how often it occurs, are a probabilistic context-free grammar; nltk's chart parser finds
the trees of a clause under it, of which the likeliest counts. So a clause that the policy
recombines ("op lost the lamp") is parsed as well, and one whose words or order the grammar does not
have is not. PP-OF and VP-INF part what of and to begin from other phrases, which settles where
they attach.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from nltk import CFG, LeftCornerChartParser, Nonterminal, Tree, induce_pcfg

from marlhf.tasks import hh_twin, tldr_twin, webgpt_twin

# What may open a clause, with no comma after it.
_FILLERS = {
    "to be fair": "(S (VP-INF (TO to) (VP (VB be) (ADJP (JJ fair)))))",
    "to be honest": "(S (VP-INF (TO to) (VP (VB be) (ADJP (JJ honest)))))",
    "you know": "(S (NP (PRP you)) (VP (VBP know)))",
    "i guess": "(S (NP (PRP i)) (VP (VBP guess)))",
    "i think": "(S (NP (PRP i)) (VP (VBP think)))",
    "it seems": "(S (NP (PRP it)) (VP (VBZ seems)))",
    "as i said": "(SBAR (IN as) (S (NP (PRP i)) (VP (VBD said))))",
    "as they say": "(SBAR (IN as) (S (NP (PRP they)) (VP (VBP say))))",
    "as far as i know": "(ADVP (RB as) (RB far) (SBAR (IN as) (S (NP (PRP i)) (VP (VBP know)))))",
}

_TLDR = """
(S (NP (DT this)) (VP (VBZ is) (ADVP (RB all))
  (PP (IN about) (NP (DT the) (NN {kin}) (NNP {name})))))
(S (NP (NN op)) (VP (VBZ has) (NP (NP (NN trouble))
  (PP (IN with) (NP (DT the) (NN {kin}) (NNP {name}))))))
(S (NP (PRP they)) (VP (VBD took) (NP (NP (DT the) (NN {item}))
  (SBAR (WHNP (WDT that)) (S (NP (NN op)) (VP (VBD had)))))))
(S (NP (NP (DT the) (NN {item})) (PP-OF (OF of) (NP (NN op))))
  (VP (VBZ has) (VP (VBN been) (VP (VBN taken)))))
(S (NP (NP (DT the) (CD two)) (PP-OF (OF of) (NP (PRP them))))
  (VP (VBD met) (PP (IN at) (NP (DT the) (NN {place})))))
(S (NP (NP (DT all)) (PP-OF (OF of) (NP (DT this))))
  (VP (VBD was) (PP (IN at) (NP (DT the) (NN {place})))))
(S (NP (PRP it)) (ADVP (RB all)) (VP (VBD took) (NP (NN place)) (PP (IN in) (NP (NNP {month})))))
(S (NP (DT this)) (VP (VBD was) (NP (DT some) (NN time)) (PP (IN in) (NP (NNP {month})))))
(S (NP (DT the) (JJ whole) (NN thing)) (VP (VBD cost) (NP (CD {price}) (NNS bucks))))
(S (NP (NN op)) (VP (VBD lost) (NP (NP (DT a) (NN sum))
  (PP-OF (OF of) (NP (CD {price}) (NNS bucks))))))
(S (ADVP (RB right) (RB now)) (NP (NN op)) (ADVP (RB only))
  (VP (VBZ wants) (S (VP-INF (TO to) (VP (VB {plan}))))))
(S (PP (IN in) (NP (DT the) (NN end))) (NP (NN op))
  (VP (MD might) (ADVP (RB just)) (VP (VB {plan}))))
(S (NP (NNP {name})) (VP (VBD lost) (NP (DT the) (NN {item}))))
(S (NP (PRP it)) (VP (VBZ rains) (NP (DT a) (NN lot))))
(S (NP (NN op)) (VP (VBZ likes) (NP (NN tea))))
(S (NP (NN op)) (VP (VBZ has) (NP (DT a) (NN cat))))
(S (NP (DT the) (NN bus)) (VP (VBD was) (ADJP (JJ late))))
(S (NP (NN op)) (VP (VBZ is) (ADJP (JJ tired))))
(S (NP (DT the) (NN sky)) (VP (VBZ is) (ADJP (JJ grey))))
(S (NP (NN op)) (VP (VBD had) (NP (NN soup))))
(S (NP (NN op)) (VP (VBZ has) (NP (DT a) (JJ bad) (NN leg))))
"""

_HH = """
(S (NP (PRP i)) (VP (VBD did) (VP (VB book) (NP (DT the) (NN {book}))
  (PP (IN for) (NP (PRP you) (DT all))))))
(S (NP (PRP i)) (VP (MD will) (VP (VB book) (NP (DT the) (NN {book})) (PP (IN at) (NP (NN noon))))))
(S (NP (PRP i)) (VP (VBD did) (VP (VB call) (NP (DT the) (NN {call})) (ADVP (RB just) (RB now)))))
(S (NP (PRP i)) (VP (MD will) (VP (VB call) (NP (DT the) (NN {call})) (ADVP (RB once) (RBR more)))))
(S (NP (PRP i)) (VP (VBD did) (VP (VB pack) (NP (DT the) (NN {pack}))
  (PP (IN in) (NP (DT a) (NN box))))))
(S (NP (PRP i)) (VP (MD will) (VP (VB pack) (NP (DT the) (NN {pack}))
  (PP (IN with) (NP (NN care))))))
(S (NP (PRP i)) (VP (VBD did) (VP (VB pay) (NP (CD {pay}) (NNS bucks))
  (PP (IN by) (NP (NN card))))))
(S (NP (PRP i)) (VP (MD will) (VP (VB pay) (NP (CD {pay}) (NNS bucks))
  (PP (IN in) (NP (NN cash))))))
(S (NP (PRP i)) (VP (VBD did) (VP (VB cook) (NP (DT the) (NN {cook}))
  (SBAR (IN as) (S (NP (PRP you)) (VP (VBP like)))))))
(S (NP (PRP i)) (VP (MD will) (VP (VB cook) (NP (DT the) (NN {cook})) (PP (IN on) (NP (NN time))))))
(S (NP (PRP i)) (VP (VBD did) (VP (VB invite) (NP (NNP {invite}))
  (PP (TO to) (NP (DT the) (NN house))))))
(S (NP (PRP i)) (VP (MD will) (VP (VB invite) (NP (NNP {invite}))
  (PP (IN in) (NP (DT a) (NN note))))))
(S (NP (PRP i)) (VP (VBD did) (VP (VB feed) (NP (DT the) (NN {feed})) (NP (DT this) (NN week)))))
(S (NP (PRP i)) (VP (MD will) (VP (VB feed) (NP (DT the) (NN {feed})) (NP (DT some) (NN hay)))))
(S (NP (PRP it)) (VP (VBZ is) (NP (NP (DT the) (JJS best)) (PP (IN in) (NP (NN town))))))
(S (NP (NP (DT all)) (PP-OF (OF of) (NP (PRP them)))) (VP (VBP love) (NP (PRP it))))
(S (NP (PRP it)) (VP (VBD won) (NP (DT a) (NN prize))))
(S (NP (DT the) (NN king)) (VP (VBZ has) (NP (NN one)) (ADVP (RB too))))
(S (NP (PRP it)) (VP (VBD was) (PP (IN on) (NP (DT the) (NN news)))))
(S (VP (VB try) (NP (PRP$ our) (JJ new) (NN shop))))
(S (NP (PRP i)) (VP (MD can) (VP (VB sell) (NP (PRP you)) (NP (DT a) (NN car)))))
(S (NP (PRP you)) (VP (MD may) (VP (VB like) (NP (PRP$ our) (NN app)))))
(S (VP (VB buy) (NP (CD two))))
(S (VP (VB get) (NP (CD three))))
(S (VP (VB do) (NP (PRP it)) (PP (IN on) (NP (PRP$ your) (JJ own)))))
(S (NP (PRP you)) (VP (VBP ask) (ADVP (RB too) (RB much))))
(S (NP (DT this)) (VP (VBZ is) (NP (DT a) (NN bore))))
(S (VP (VB stop) (S (VP (VBG asking) (NP (PRP me))))))
(INTJ (JJ sure))
(ADVP (OF of) (RB course))
(ADVP (RB gladly))
(PP (IN with) (NP (NN pleasure)))
(ADJP (JJ glad) (S (VP-INF (TO to) (VP (VB help)))))
(S (ADVP (RB just)) (VP (VB ask) (PP (IN for) (NP (JJR more)))))
(S (VP (VB have) (NP (DT a) (JJ nice) (NN day))))
(NP (NP (PDT all) (DT the) (JJS best)) (PP (TO to) (NP (PRP you))))
"""

_WEBGPT = """
(S (NP (PRP you)) (VP (VBP have) (S (VP-INF (TO to) (VP (VB pay) (NP (CD {cost}) (NNS bucks)))))))
(S (NP (NP (DT the) (NN price)) (PP-OF (OF of) (NP (PRP it))))
  (VP (VBZ is) (NP (CD {cost}) (NNS bucks))))
(S (NP (PRP it)) (VP (VBZ is) (VP (VBN held) (PP (IN at) (NP (DT the) (NN {place}))))))
(S (NP (PRP you)) (VP (MD will) (VP (VB find) (NP (PRP it))
  (PP (IN at) (NP (DT the) (NN {place}))))))
(S (NP (PRP it)) (VP (MD will) (VP (VB take) (NP (NN place)) (PP (IN in) (NP (NNP {month}))))))
(S (NP (DT the) (JJ whole) (NN thing)) (VP (VBZ is) (PP (IN in) (NP (NNP {month})))))
(S (NP (NP (DT the) (NN one)) (PP (IN in) (NP (NN charge)))) (VP (VBZ is) (NP (NNP {host}))))
(S (NP (NP (DT all)) (PP-OF (OF of) (NP (PRP it)))) (VP (VBZ is) (VP (VBN run)
  (PP (IN by) (NP (NNP {host}))))))
(S (NP (DT the) (JJS best) (NN one)) (VP (VBZ wins) (NP (DT a) (NN {prize}))))
(S (SBAR (WHNP (WP who)) (S (VP (VBZ comes) (ADVP (RB first)))))
  (VP (VBZ gets) (NP (DT a) (NN {prize}))))
(S (NP (PRP they)) (VP (MD will) (VP (VB serve) (NP (PRP you)) (NP (DT some) (NN {food})))))
(S (ADVP (RB there)) (NP (PRP you)) (VP (MD can) (VP (VB eat) (NP (DT some) (NN {food})))))
(S (NP (PRP you)) (VP (VBP are) (S (VP-INF (TO to) (VP (VB bring) (NP (DT a) (NN {gear})))))))
(S (VP (VB do) (RB not) (VP (VB forget) (S (VP-INF (TO to)
  (VP (VB take) (NP (DT a) (NN {gear}))))))))
(S (NP (DT all) (NN day)) (NP (PRP they)) (VP (MD will) (VP (VB play) (NP (NN {music})))))
(S (ADVP (RB there)) (NP (PRP you)) (VP (MD can) (VP (VB hear) (NP (DT some) (NN {music})))))
(S (NP (PRP it)) (VP (VBZ is) (ADVP (RB always)) (NP (JJ great) (NN fun))))
(S (NP (NP (NN everyone)) (PP (IN in) (NP (NN town)))) (VP (VBZ loves) (NP (PRP it))))
(S (NP (NN nobody)) (VP (MD should) (ADVP (RB ever)) (VP (VB miss) (NP (PRP it)))))
(S (NP (PRP it)) (VP (VBZ gets) (ADJP (JJR better)) (NP (DT each) (NN year))))
(S (NP (PRP you)) (VP (MD will) (ADVP (RB never)) (VP (VB regret) (NP (PRP it)))))
(S (NP (NNS people)) (VP (VBP talk) (PP-OF (OF of) (NP (NP (NN nothing)) (ADJP (RB else))))))
"""

# Task: trees of its clauses, what may open them, values by slot.
_BANKS = {
    "tldr": (_TLDR, tldr_twin.FILLERS, tldr_twin.VALUES),
    "hh": (_HH, hh_twin.FILLERS, {kind: e.values for kind, e in hh_twin.ERRANDS.items()}),
    "webgpt": (_WEBGPT, webgpt_twin.HEDGES, webgpt_twin.VALUES),
}


def treebank(task: str) -> list[Tree]:
    """The trees of a task's clauses. ValueError for a task without a grammar here."""
    if task not in _BANKS:
        raise ValueError(
            f"ppo.macro.parser=twin: the task {task!r} has no grammar in marlhf/grammars.py, "
            f"only {', '.join(_BANKS)} have: choose another parser or another termination"
        )
    lines = _BANKS[task][0].strip().replace("\n  ", " ").splitlines()
    return [Tree("ROOT", [Tree.fromstring(line)]) for line in lines]


class ClauseParser:
    """The likeliest tree of a clause under the grammar of a task's treebank.

    What opens a clause ("you know") is looked up. The rest is parsed by its pattern, which has the
    slots in the place of their values, so that each pattern meets the chart once, then a cache.
    """

    def __init__(self, task: str):
        bank = treebank(task)
        _, fillers, values = _BANKS[task]
        self._terminals = {v: f"{{{slot}}}" for slot, each in values.items() for v in each}
        # a word of the grammar is itself before it is a value
        self._terminals |= {w: w for tree in bank for w in tree.leaves() if w[0] != "{"}
        self._openings = {
            tuple(text.split()): Tree("PRN", [Tree.fromstring(_FILLERS[text])]) for text in fillers
        }
        productions = [production for tree in bank for production in tree.productions()]
        grammar = induce_pcfg(Nonterminal("ROOT"), productions)
        self._weights = {(p.lhs(), p.rhs()): p.logprob() for p in grammar.productions()}
        self._chart = LeftCornerChartParser(CFG(grammar.start(), grammar.productions()))
        self._parse = lru_cache(maxsize=65536)(self._likeliest)

    def __call__(self, words: Sequence[str]) -> Tree | None:
        """The tree of a clause, its leaves words or slots; None if the grammar has none."""
        words = tuple(words)
        for length in range(len(words), 0, -1):
            if opening := self._openings.get(words[:length]):
                if length == len(words):
                    return Tree("ROOT", [opening])
                rest = self._parsed(words[length:])
                return rest and Tree("ROOT", [Tree("S", [opening, *rest])])
        return self._parsed(words)

    def _parsed(self, words: tuple[str, ...]) -> Tree | None:
        pattern = tuple(self._terminals.get(word) for word in words)
        return self._parse(pattern) if pattern and None not in pattern else None

    def _likeliest(self, pattern: tuple[str, ...]) -> Tree | None:
        def rank(tree):  # among equals the first by its brackets, whatever order they come in
            weight = sum(self._weights[p.lhs(), p.rhs()] for p in tree.productions())
            return round(-weight, 9), tree.pformat(margin=10**6)

        return min(self._chart.parse(pattern), key=rank, default=None)
