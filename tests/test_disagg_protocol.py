"""The state machines of transfers: every state of small worlds, planted bugs, and a test for each rule."""

import pytest

from deepstack_jax.disagg.encode.sender import FinishedAttempt, Sender, SenderSettings
from deepstack_jax.disagg.language.pending import ReceiverSettings
from deepstack_jax.disagg.language.receiver import Receiver
from deepstack_jax.disagg.wire.messages import (
    Abort,
    Aborted,
    Accepted,
    Encoded,
    Error,
    Grant,
    Prepared,
    Release,
    Submit,
    Want,
    Written,
    WrittenBlock,
)
from deepstack_jax.disagg.wire.transfer import (
    AttemptKey,
    CopyOut,
    EncodeBlocks,
    EncodeLocally,
    Ended,
    Forget,
    Prepare,
    PromptKnown,
    Send,
    StartWrite,
    State,
    Wipe,
)
from tests.disagg_model import NETWORK_FAULTS, Case, Violation, explore

CHECKSUM = b"checksum"
FINGERPRINT = b"prompt A"


class TestEveryState:
    """Each case visits every state that it can reach; `explore` checks the invariants in all of them."""

    @pytest.mark.parametrize(
        ("case", "least_states"),
        [
            pytest.param(Case((2, 2), pool=1, share=1), 300, id="one block for two requests"),
            pytest.param(Case((2, 2), pool=1, share=1, faults=2, kinds=NETWORK_FAULTS), 23_000, id="a lossy network"),
            pytest.param(
                Case((2, 2), pool=1, share=1, faults=1),
                59_000,
                id="one block, any fault",
                marks=pytest.mark.exhaustive,
            ),
            pytest.param(
                Case((2, 2), pool=2, share=2, faults=1),
                87_000,
                id="two blocks, any fault",
                marks=pytest.mark.exhaustive,
            ),
            pytest.param(
                Case((3,), pool=2, share=2, faults=2),
                63_000,
                id="rounds, any two faults",
                marks=pytest.mark.exhaustive,
            ),
            pytest.param(
                Case((2,), pool=1, share=1, faults=2, encoders=2, own_prompts=True),
                50_000,
                id="another encoder, another prompt",
                marks=pytest.mark.exhaustive,
            ),
            pytest.param(
                Case((2, 1), pool=1, share=1, faults=1, kinds=NETWORK_FAULTS, slow_encoding=True, slow_admission=True),
                24_900,
                id="image by image",
            ),
            pytest.param(
                Case((2,), pool=1, share=1, faults=1, encoders=2, slow_encoding=True, slow_admission=True),
                16_500,
                id="image by image, any fault",
            ),
            pytest.param(
                Case((2,), pool=1, share=1, faults=1, slow_encoding=True, slow_admission=True, cached=(0, 1, 2)),
                7_600,
                id="blocks found in the prefix cache",
            ),
            pytest.param(
                Case((3,), pool=1, share=1, faults=1, slow_encoding=True, slow_admission=True, cached=(2, 1)),
                4_300,
                id="blocks lost from the prefix cache",
            ),
            pytest.param(
                Case((1, 1), pool=1, share=1, faults=1, slow_admission=True, cached=(0, 1)),
                10_000,
                id="everything found in the prefix cache",
            ),
            pytest.param(
                Case((2,), pool=2, share=2, faults=2, slow_copies=True, encodes_locally=True),
                61_000,
                id="slow copies",
                marks=pytest.mark.exhaustive,
            ),
            pytest.param(
                Case((2,), 1, 1, faults=2, slow_copies=True, slow_preparation=True, slow_starts=True),
                25_000,
                id="everything slow",
            ),
            pytest.param(
                Case((2,), 1, 1, faults=2, encoders=2, slow_copies=True, slow_preparation=True, slow_starts=True),
                120_000,
                id="everything slow, two encoders",
                marks=pytest.mark.exhaustive,
            ),
            pytest.param(
                Case((1, 1), pool=1, share=1, faults=2),
                600_000,
                id="a block changes hands",
                marks=pytest.mark.exhaustive,
            ),
        ],
    )
    def test_every_run_ends_and_no_block_is_lost_or_used_twice(self, case, least_states):
        explored = explore(case)
        assert explored.states >= least_states  # the search has not stopped early
        assert any("SUCCESS" in end for end in explored.ends)
        if case.faults and case.kinds != NETWORK_FAULTS:
            assert any("FAILED" in end for end in explored.ends)


class FreesAtAbort(Receiver):
    def _abandon(self, request_id, request, reason, now):
        actions = super()._abandon(request_id, request, reason, now)
        self._release((request_id, request.attempt)) if (request_id, request.attempt) in self.abandoned else None
        return actions


class TrustsTheSender(Receiver):
    def copied(self, request_id, attempt, round, token_block, checksum, num_bytes, now):
        request = self.requests.get(request_id)
        reports = request and request.written.get(token_block)
        checksum, num_bytes = (reports.checksum, reports.num_bytes) if reports else (checksum, num_bytes)
        return super().copied(request_id, attempt, round, token_block, checksum, num_bytes, now)


class AsksOnce(Receiver):
    def tick(self, now):
        for request in self.requests.values():
            request.resend_at = float("inf")
        return super().tick(now)


class MixesPrompts(Receiver):
    def _prepared(self, request, message, now):
        request.fingerprint = request.fingerprint and message.fingerprint
        return super()._prepared(request, message, now)


class WantsOnce(Receiver):
    def _send_unanswered(self, request_id, request, now):
        return [one for one in super()._send_unanswered(request_id, request, now) if not isinstance(one.message, Want)]


class GrantsWithoutAdmission(Receiver):
    def want(self, request_id, blocks, admitted, now):
        return super().want(request_id, blocks, True, now)


class KeepsTheFirstWant(Sender):
    def _want(self, key, message):
        if key in self.outgoing and self.outgoing[key].version:
            return self._report_encoded(key, self.outgoing[key])
        return super()._want(key, message)


class ConfirmsTooSoon(Sender):
    def _abort(self, key):
        early = [Send(key.peer, Aborted(key.request_id, key.attempt))] if key in self.outgoing else []
        return early + super()._abort(key)


class ConfirmsAfterFailure(Sender):
    def _confirm_abort(self, key, finished):
        return super()._confirm_abort(key, FinishedAttempt(finished.error, clean=True))


class ForgetsAttempts(Sender):
    def _remember(self, key, finished):
        return finished


class WritesAgain(Sender):
    def _grant(self, key, message, now):
        if key in self.outgoing:
            for token_block, _ in message.blocks:
                self.outgoing[key].granted.pop(token_block, None)
        return super()._grant(key, message, now)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case((1, 1), pool=1, share=1, faults=1, receiver=FreesAtAbort), "free or not its own"),
        (Case((1, 1), pool=1, share=1, faults=1, receiver=TrustsTheSender), "expected b'r|ended with only blocks"),
        (
            Case((1,), pool=1, share=1, faults=1, kinds=NETWORK_FAULTS, receiver=AsksOnce),
            "despite a lossy network only",
        ),
        (
            Case((2,), pool=1, share=1, faults=1, encoders=2, own_prompts=True, receiver=MixesPrompts),
            "two prompts|a second prompt",
        ),
        (
            Case((2,), 1, 1, faults=1, kinds=NETWORK_FAULTS, slow_encoding=True, receiver=WantsOnce),
            "despite a lossy network only",
        ),
        (
            Case((2,), pool=1, share=1, slow_admission=True, cached=(0, 1), receiver=GrantsWithoutAdmission),
            "although the engine had it",
        ),
        (
            Case((2,), pool=1, share=1, slow_admission=True, cached=(1, 0), sender=KeepsTheFirstWant),
            "despite a lossy network only",
        ),
        (Case((1, 1), pool=1, share=1, faults=1, sender=ConfirmsTooSoon), "free or not its own"),
        (Case((2,), pool=2, share=2, faults=1, sender=ConfirmsAfterFailure), "free or not its own"),
        (Case((1,), pool=1, share=1, faults=2, sender=ForgetsAttempts), "free or not its own"),
        (Case((1,), pool=1, share=1, faults=1, kinds=NETWORK_FAULTS, sender=WritesAgain), "written twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.receiver.__name__} {value.sender.__name__}",
)
def test_the_search_finds_a_planted_bug(case, reason):
    with pytest.raises(Violation, match=reason):
        explore(case)


def receiver(**changed) -> Receiver:
    """A receiver with two encoders, four blocks of two tokens, and a share of two blocks per request."""
    defaults = {
        "num_blocks": 4,
        "block_size": 2,
        "share": 2,
        "max_tokens": 20,
        "retry_interval": 1,
        "transfer_timeout": 10,
    }
    made = Receiver(ReceiverSettings(**(defaults | changed)))
    made.peer_up("a", 0)
    made.peer_up("b", 0)
    return made


def sent(actions) -> list:
    return [action.message for action in actions if isinstance(action, Send)]


def prepared(made: Receiver, request_id: str, tokens: int, peer: str = "a", now: float = 0.0) -> list:
    """Delivers Prepared for the request; returns the receiver's actions."""
    attempt = made.requests[request_id].attempt
    return made.receive(peer, Prepared(request_id, attempt, tokens, tokens, -1, FINGERPRINT), now)


def encoded(made: Receiver, request_id: str, *blocks: tuple[int, int], peer: str = "a", now: float = 0.0) -> list:
    """Delivers Encoded for ranges of blocks of the request; returns the receiver's actions."""
    return made.receive(peer, Encoded(request_id, made.requests[request_id].attempt, blocks), now)


def ready(made: Receiver, request_id: str, tokens: int, peer: str = "a", now: float = 0.0) -> list:
    """Delivers that the prompt is known and all of its blocks are encoded; returns the last actions."""
    actions = prepared(made, request_id, tokens, peer, now)
    if request_id not in made.requests:
        return actions
    made.want(request_id, range(-(-tokens // 2)), True, now)
    return encoded(made, request_id, (0, -(-tokens // 2)), peer=peer, now=now)


def arrive(made: Receiver, request_id: str, now: float = 0.0, checksum: bytes = CHECKSUM) -> list:
    """Delivers every granted block of the request and copies it out; returns the receiver's actions."""
    request = made.requests[request_id]
    reports = tuple(WrittenBlock(block, CHECKSUM, 8) for block in request.granted)
    copies = made.receive(request.peer, Written(request_id, request.attempt, request.round, reports), now)
    actions = []
    for copy in copies:
        assert isinstance(copy, CopyOut)
        actions += made.copied(request_id, copy.attempt, copy.round, copy.token_block, checksum, 8, now)
    return actions


class TestReceiver:
    def test_a_request_from_its_start_to_its_end(self):
        made = receiver()
        [submit] = sent(made.submit("r", b"what is it?", deadline=60, now=2))
        assert submit == Submit("r", 1, budget_ms=58000, payload=b"what is it?")
        made.receive("a", Accepted("r", 1), 2)
        assert made.requests["r"].state == State.BOOTSTRAPPING
        prompt = Prepared("r", 1, 7, 7, -1, FINGERPRINT)
        assert made.receive("a", prompt, 2) == [PromptKnown("r", prompt)]
        assert made.want("r", range(4), True, 2) == [Send("a", Want("r", 1, 1, ((0, 4),)))]
        assert encoded(made, "r", (0, 4)) == [Send("a", Grant("r", 1, 1, ((0, 0), (1, 1))))]
        assert made.requests["r"].state == State.TRANSFERRING
        assert arrive(made, "r") == [Send("a", Grant("r", 1, 2, ((2, 0), (3, 1))))]
        copies = made.receive("a", Written("r", 1, 2, (WrittenBlock(3, CHECKSUM, 8), WrittenBlock(2, CHECKSUM, 8))), 3)
        assert copies == [CopyOut("r", 1, 2, 3, 1, CHECKSUM, 8), CopyOut("r", 1, 2, 2, 0, CHECKSUM, 8)]
        assert made.copied("r", 1, 2, 3, CHECKSUM, 8, 3) == []
        ended = [Send("a", Release("r", 1)), Ended("r", State.SUCCESS, 200, "")]
        assert made.copied("r", 1, 2, 2, CHECKSUM, 8, 3) == ended
        assert made.pool.num_free == 4
        assert made.next_timer() is None

    def test_64_requests_in_a_pool_for_three_end_in_order(self):
        made = receiver(num_blocks=6, share=2)
        for index in range(64):
            made.submit(f"r{index}", b"", 1000, 0)
        actions = []
        for index in reversed(range(64)):  # the newest are encoded first
            tokens = 2 * (1 + index % 5)  # one to five blocks, one to three rounds
            actions += ready(made, f"r{index}", tokens, made.requests[f"r{index}"].peer)
        actions = [action for action in actions if isinstance(action, Send)]
        grants, ended = [], []
        while True:
            grants += [action.message.request_id for action in actions if isinstance(action.message, Grant)]
            waiting = [request for request in made.requests.values() if request.waits_for_blocks]
            assert not waiting or made.pool.num_free < 2
            if not made.requests:
                break
            # blocks arrive in the order of their grants
            first = next(name for name in grants if name in made.requests and made.requests[name].granted)
            grants.remove(first)
            actions = arrive(made, first)
            ended += [int(action.request_id[1:]) for action in actions if isinstance(action, Ended)]
            actions = [action for action in actions if isinstance(action, Send)]
        assert sorted(ended) == list(range(64))
        # the newest got blocks before the others were encoded; each of the rest ends after at most two newer ones
        rest = [index for index in ended if index < 60]
        assert max(sum(other > index for other in rest[:place]) for place, index in enumerate(rest)) <= 2

    def test_a_waiting_request_holds_no_blocks_and_waits_for_a_whole_share(self):
        made = receiver(num_blocks=3, share=2)
        for name in ("old", "new"):
            made.submit(name, b"", 60, 0)
            ready(made, name, 8, made.requests[name].peer)
        assert (list(made.requests["old"].granted), list(made.requests["new"].granted)) == ([0, 1], [])
        assert made.pool.num_free == 1

    def test_quarantine_reduces_rounds_instead_of_stopping_them(self):
        made = receiver(num_blocks=2, share=2)
        made.submit("gone", b"", 60, 0)
        ready(made, "gone", 2)  # one block
        made.abort("gone", "the client has gone", 0)
        made.submit("next", b"", 60, 0)
        ready(made, "next", 4, made.requests["next"].peer)
        assert list(made.requests["next"].granted) == [0]

    def test_unanswered_messages_are_repeated_with_the_payload_until_it_is_accepted(self):
        made = receiver()
        made.submit("r", b"payload", 60, 0)
        assert made.next_timer() == 1
        assert sent(made.tick(1)) == [Submit("r", 1, 59000, b"payload")]
        made.receive("a", Accepted("r", 1), 1)
        assert sent(made.tick(2)) == [Submit("r", 1, 58000, None)]
        prepared(made, "r", 6)
        assert made.tick(3) == []  # nothing is wanted yet
        made.want("r", range(3), True, 3)
        assert sent(made.tick(4)) == [Want("r", 1, 1, ((0, 3),))]
        encoded(made, "r", (0, 2), now=4)
        assert sent(made.tick(5)) == [Grant("r", 1, 1, ((0, 0), (1, 1))), Want("r", 1, 1, ((0, 3),))]
        encoded(made, "r", (0, 3), now=5)
        made.receive("a", Written("r", 1, 1, (WrittenBlock(0, CHECKSUM, 8),)), 5)
        assert sent(made.tick(6)) == [Grant("r", 1, 1, ((1, 1),))]

    def test_blocks_are_granted_once_the_engine_has_admitted_the_request_and_their_images_are_encoded(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        prepared(made, "r", 10)
        assert sent(made.want("r", range(5), False, 0)) == [Want("r", 1, 1, ((0, 5),))]
        assert encoded(made, "r", (0, 1), (3, 4)) == []  # it holds no blocks while it waits
        assert made.want("r", range(5), True, 0) == [Send("a", Grant("r", 1, 1, ((0, 0), (3, 1))))]
        assert encoded(made, "r", (0, 2), (3, 4)) == []  # one round at a time
        assert arrive(made, "r") == [Send("a", Grant("r", 1, 2, ((1, 0),)))]

    def test_what_the_engine_has_is_neither_encoded_nor_granted(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        prepared(made, "r", 8)
        made.want("r", range(4), False, 0)
        assert sent(made.want("r", (2, 3), True, 0)) == [Want("r", 1, 2, ((2, 4),))]
        assert sent(encoded(made, "r", (0, 1), (2, 3))) == [Grant("r", 1, 1, ((2, 0),))]
        assert arrive(made, "r") == []
        assert made.want("r", (2,), True, 0) == [Send("a", Release("r", 1)), Ended("r", State.SUCCESS, 200, "")]

    def test_a_request_whose_rows_the_engine_has_ends_at_once(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        prepared(made, "r", 8)
        assert sent(made.want("r", (), False, 0)) == [Want("r", 1, 1, ())]  # not yet: the cache may lose them
        assert made.want("r", (), True, 0) == [Send("a", Release("r", 1)), Ended("r", State.SUCCESS, 200, "")]

    def test_granted_blocks_that_are_no_longer_wanted_are_waited_for(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        ready(made, "r", 4)
        assert sent(made.want("r", (), True, 0)) == [Want("r", 1, 2, ())]
        assert [type(action) for action in arrive(made, "r")] == [Send, Ended]
        assert made.pool.num_free == 4

    def test_wanted_blocks_outside_the_prompt_do_not_count(self):
        made = receiver()
        assert made.want("unknown", (0,), True, 0) == []
        made.submit("r", b"", 60, 0)
        assert made.want("r", (0,), True, 0) == []  # its prompt is not known
        prepared(made, "r", 4)
        assert sent(made.want("r", (-1, 1, 2), True, 0)) == [Want("r", 1, 1, ((1, 2),))]
        assert sent(encoded(made, "r", (1, 1 << 20))) == [Grant("r", 1, 1, ((1, 0),))]

    def test_another_encoder_sends_only_the_missing_blocks(self):
        made = receiver()
        made.submit("r", b"payload", 60, 0)
        ready(made, "r", 9)
        arrive(made, "r")
        abort, submit = sent(made.peer_down("a", "a is dead", 5))
        assert made.failovers == 1
        assert abort == Abort("r", 1, "a is dead")
        assert submit == Submit("r", 2, 55000, b"payload")
        assert prepared(made, "r", 9, "b") == [Send("b", Want("r", 2, 1, ((2, 5),)))]
        [grant] = encoded(made, "r", (2, 5), peer="b")
        assert grant == Send("b", Grant("r", 2, 3, ((2, 2), (3, 3))))  # blocks 0 and 1 are in quarantine

    @pytest.mark.parametrize(("tokens", "fingerprint"), [(9, b"prompt B"), (8, FINGERPRINT)])
    def test_an_encoder_that_prepares_another_prompt_is_not_used(self, tokens, fingerprint):
        made = receiver(max_attempts=2)
        made.submit("r", b"payload", 60, 0)
        ready(made, "r", 9)
        arrive(made, "r")
        made.peer_down("a", "a is dead", 5)
        ended = made.receive("b", Prepared("r", 2, tokens, tokens, 0, fingerprint), 5)[-1]
        assert (ended.status, "b prepared another prompt than the encoder before" in ended.reason) == (502, True)

    @pytest.mark.parametrize("confirmed", [True, False])
    def test_blocks_of_an_aborted_attempt_are_freed_when_confirmed_or_after_the_timeout(self, confirmed):
        made = receiver()
        made.submit("r", b"", 60, 0)
        ready(made, "r", 4)
        _, ended = made.abort("r", "the client has gone", 2)
        assert ended == Ended("r", State.FAILED, 499, "the client has gone")
        assert (made.pool.num_free, made.pool.num_quarantined) == (2, 2)
        made.receive("b", Aborted("r", 1), 3)  # not its encoder
        assert sent(made.tick(3)) == [Abort("r", 1)]
        made.tick(11.9)
        assert made.pool.num_quarantined == 2
        actions = made.receive("a", Aborted("r", 1), 11.9) if confirmed else made.tick(12)
        assert actions == [Wipe((0, 1))]  # what has been written and was never copied
        assert made.pool.num_free == 4

    def test_blocks_are_wiped_before_they_are_granted_again(self):
        made = receiver(num_blocks=2)
        for name in ("r", "s"):
            made.submit(name, b"", 60, 0)
            ready(made, name, 4, peer=made.requests[name].peer)
        made.abort("r", "the client has gone", 2)
        wipe, grant = made.receive("a", Aborted("r", 1), 3)
        assert isinstance(wipe, Wipe)
        assert isinstance(grant.message, Grant)
        assert {block for _, block in grant.message.blocks} <= {*wipe.pool_blocks}

    def test_a_bad_request_ends_immediately_and_a_failing_encoder_is_replaced(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        assert sent(made.receive("a", Error("r", 1, 500, "out of memory"), 1))[1].attempt == 2
        _, ended = made.receive("b", Error("r", 2, 400, "no image"), 1)
        assert ended == Ended("r", State.FAILED, 400, "no image")

    def test_without_an_encoder_the_request_is_encoded_locally_or_fails_with_503(self):
        for locally, expected in (
            (True, EncodeLocally("r", "b is dead")),
            (False, Ended("r", State.FAILED, 503, "no encoder is left: b is dead")),
        ):
            made = receiver(encodes_locally=locally)
            made.submit("r", b"", 60, 0)
            made.peer_down("a", "a is dead", 1)
            assert made.peer_down("b", "b is dead", 1)[-1] == expected

    def test_the_same_encoder_is_retried_after_an_interval_and_a_limited_number_of_times(self):
        made = receiver(max_attempts=3)
        made.peer_down("b", "", 0)
        made.submit("r", b"payload", 60, 0)
        assert sent(made.receive("a", Error("r", 1, 503, "busy"), 0)) == [Abort("r", 1, "a: busy")]
        assert sent(made.tick(1)) == [Submit("r", 2, 59000, b"payload")]
        made.receive("a", Error("r", 2, 503, "busy"), 1)
        made.tick(2)
        assert made.receive("a", Error("r", 3, 503, "busy"), 2)[-1].status == 503

    def test_a_slow_encoder_gets_requests_only_if_there_is_no_other(self):
        made = receiver()
        made.peer_up("b", 0)
        made.set_slow("a", True)
        made.set_slow("unknown", True)
        for number in range(3):
            made.submit(f"r{number}", b"", 9, 0)
            assert made.requests[f"r{number}"].peer == "b"
        made.peer_down("b", "gone", 0)
        assert {request.peer for request in made.requests.values()} == {"a"}
        made.peer_up("b", 0)
        made.set_slow("a", False)
        made.submit("r4", b"", 9, 0)
        made.peer_down("a", "gone", 0)
        assert not made.slow

    def test_a_request_that_fails_on_every_encoder_reports_their_reason(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        made.receive("a", Error("r", 1, 500, "encoding failed (KeyError)"), 1)
        made.receive("b", Error("r", 2, 500, "encoding failed (TypeError)"), 1)
        now = 1.0
        while "r" in made.requests:
            now += 1
            made.tick(now)
            [request] = made.requests.values()
            actions = made.receive(request.peer, Error("r", request.attempt, 500, f"failed at {request.peer}"), now)
        assert actions[-1] == Ended("r", State.FAILED, 500, "b: failed at b")
        assert sorted(made.peers) == ["a", "b"]  # neither counts as gone

    def test_an_encoder_that_disconnects_does_not_hide_the_failure_on_another(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        made.receive("a", Error("r", 1, 500, "out of memory"), 1)
        made.peer_down("a", "a is dead", 2)
        assert made.peer_down("b", "b is dead", 2)[-1] == Ended("r", State.FAILED, 500, "a: out of memory")

    @pytest.mark.parametrize(("status", "reason"), [(503, "the encode node has 256 requests"), (504, "too late")])
    def test_an_encoder_that_refuses_because_of_its_state_is_quoted(self, status, reason):
        made = receiver(max_attempts=2)
        made.submit("r", b"", 60, 0)
        made.receive("a", Error("r", 1, 503, "busy"), 1)
        ended = made.receive("b", Error("r", 2, status, reason), 1)[-1]
        assert ended == Ended("r", State.FAILED, status, f"b: {reason}")

    def test_this_node_encodes_a_request_that_failed_on_every_encoder(self):
        made = receiver(encodes_locally=True, max_attempts=2)
        made.submit("r", b"", 60, 0)
        made.receive("a", Error("r", 1, 500, "out of memory"), 1)
        assert made.receive("b", Error("r", 2, 500, "the same"), 1)[-1] == EncodeLocally("r", "b: the same")

    def test_damaged_blocks_are_requested_again_a_few_times(self):
        made = receiver(max_damaged=2)
        made.submit("r", b"", 60, 0)
        ready(made, "r", 2)
        for round in (2, 3):
            assert arrive(made, "r", checksum=b"damaged!") == [Send("a", Grant("r", 1, round, ((0, 0),)))]
        ended = arrive(made, "r", checksum=b"damaged!")[-1]
        assert (ended.status, made.pool.num_free) == (502, 4)

    @pytest.mark.parametrize(
        ("stage", "reason"),
        [
            (0, "while a prepared the request"),
            (1, "waited for the engine"),
            (2, "encoded the images"),
            (3, "waited for receive blocks"),
            (4, "during the transfer"),
        ],
    )
    def test_deadline_errors_name_what_the_request_was_waiting_for(self, stage, reason):
        made = receiver(num_blocks=2, transfer_timeout=100)
        if stage == 3:
            made.submit("before", b"", 200, 0)
            ready(made, "before", 4)
        made.submit("r", b"", 60, 0)
        peer = made.requests["r"].peer
        if stage:
            prepared(made, "r", 4, peer)
            made.want("r", range(2), stage > 1, 0)
        if stage > 2:
            encoded(made, "r", (0, 2), peer=peer)
        ended = made.tick(60)[-1]
        assert (ended.request_id, ended.status) == ("r", 504)
        assert reason in ended.reason

    def test_an_encoder_that_stops_writing_is_replaced(self):
        made = receiver()
        made.submit("r", b"", 600, 0)
        ready(made, "r", 4, now=5)
        made.receive("a", Written("r", 1, 1, (WrittenBlock(0, CHECKSUM, 8),)), 12)
        assert [type(message) for message in sent(made.tick(21.9))] == [Grant]
        assert [type(message) for message in sent(made.tick(22))] == [Abort, Submit]

    def test_late_and_misdirected_messages_are_counted_and_ignored(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        ready(made, "r", 4)
        for peer, message in (
            ("b", Error("r", 1, 400, "not its encoder")),
            ("a", Written("r", 1, 7, (WrittenBlock(0, CHECKSUM, 8),))),
            ("a", Written("r", 1, 1, (WrittenBlock(9, CHECKSUM, 8),))),
            ("a", Written("r", 9, 1, (WrittenBlock(0, CHECKSUM, 8),))),
            ("a", Prepared("r", 1, 4, 4, 0, FINGERPRINT)),
            ("a", Encoded("r", 1, ((0, 1),))),  # it is known
            ("b", Encoded("r", 1, ((0, 3),))),
            ("a", Aborted("r", 1)),
            ("a", Submit("r", 1, 5)),
        ):
            assert made.receive(peer, message, 0) == []
        assert sum(made.ignored.values()) == 9
        assert made.copied("r", 1, 1, 0, CHECKSUM, 8, 0) == []  # no copy is in progress
        assert made.abort("unknown", "", 0) == []

    def test_invalid_requests_are_refused_before_they_start(self):
        made = receiver()
        made.submit("r", b"", 60, 0)
        with pytest.raises(ValueError, match="'r' is already in progress"):
            made.submit("r", b"", 60, 0)
        for bad in ("", "a b", "x" * 65, "a\n"):
            with pytest.raises(ValueError, match="1 to 64 printable"):
                made.submit(bad, b"", 60, 0)
        with pytest.raises(ValueError, match="share 5: expected 1 to 4 blocks"):
            receiver(share=5)
        actions = ready(made, "r", 21)
        assert actions[-1] == Ended("r", State.FAILED, 400, "the prompt has 21 tokens: expected up to 20")


class TestSender:
    KEY = AttemptKey("lang", "r", 1)
    PROMPT = Prepared("r", 1, 7, 5, -2, FINGERPRINT)

    def made(self, **changed) -> Sender:
        made = Sender(SenderSettings(block_size=2, **changed))
        made.peer_up("lang", 4, 0)
        return made

    def transferring(self) -> Sender:
        """Blocks 0 and 1 are being written."""
        made = self.made()
        made.receive("lang", Submit("r", 1, 60000, b"payload"), 0)
        made.prepared(self.KEY, self.PROMPT, 0)
        made.encoded(self.KEY, range(4), 0)
        made.receive("lang", Grant("r", 1, 1, ((0, 2), (1, 3))), 0)
        return made

    def test_a_request_from_its_start_to_its_end(self):
        made = self.made()
        accepted, prepare = made.receive("lang", Submit("r", 1, 60000, b"payload"), 1)
        assert accepted == Send("lang", Accepted("r", 1))
        assert prepare == Prepare(self.KEY, b"payload", 61.0)
        assert made.prepared(self.KEY, self.PROMPT, 2) == [Send("lang", self.PROMPT)]
        encode = made.receive("lang", Want("r", 1, 1, ((1, 2), (3, 9))), 2)
        assert encode == [EncodeBlocks(self.KEY, ((1, 2), (3, 4)))]
        assert made.encoded(self.KEY, [3], 3, 500) == [Send("lang", Encoded("r", 1, ((3, 4),), 500))]
        assert made.encoded(self.KEY, [1], 3, 900) == [Send("lang", Encoded("r", 1, ((1, 2), (3, 4)), 900))]
        writes = made.receive("lang", Grant("r", 1, 1, ((1, 2), (3, 0))), 3)
        assert writes == [StartWrite(self.KEY, 1, ((1, 2), (3, 0)))]
        written = made.written(self.KEY, 1, [WrittenBlock(3, CHECKSUM, 8)], 3)
        assert written == [Send("lang", Written("r", 1, 1, (WrittenBlock(3, CHECKSUM, 8),)))]
        made.written(self.KEY, 1, [WrittenBlock(1, CHECKSUM, 8)], 3)
        assert made.receive("lang", Release("r", 1), 4) == [Forget(self.KEY)]
        assert (made.outgoing, made.next_timer()) == ({}, None)

    def test_repeated_messages_are_answered_and_nothing_is_done_twice(self):
        made = self.made()
        submit, grant = Submit("r", 1, 60000, b"payload"), Grant("r", 1, 1, ((0, 2),))
        made.receive("lang", submit, 0)
        assert made.receive("lang", submit, 0) == [Send("lang", Accepted("r", 1))]
        prepared = made.prepared(self.KEY, self.PROMPT, 0)
        assert made.receive("lang", submit, 0) == prepared
        assert made.receive("lang", grant, 0) == []  # its rows are not encoded
        made.encoded(self.KEY, [0], 0)
        made.receive("lang", grant, 0)
        assert made.receive("lang", grant, 0) == []  # in progress
        written = made.written(self.KEY, 1, [WrittenBlock(0, CHECKSUM, 8)], 0)
        assert made.receive("lang", grant, 0) == written
        assert made.receive("lang", Grant("r", 1, 1, ((0, 3),)), 0) == []  # another block in the same round
        assert made.receive("lang", Grant("r", 1, 2, ((0, 3),)), 0) == [StartWrite(self.KEY, 2, ((0, 3),))]

    def test_the_newest_want_counts(self):
        made = self.made()
        made.receive("lang", Submit("r", 1, 60000, b"payload"), 0)
        assert made.receive("lang", Want("r", 1, 1, ((0, 4),)), 0) == []  # too early
        assert made.encoded(self.KEY, [0], 0) == []
        made.prepared(self.KEY, self.PROMPT, 0)
        assert made.receive("lang", Want("r", 1, 2, ((0, 2),)), 0) == [EncodeBlocks(self.KEY, ((0, 2),))]
        assert made.receive("lang", Want("r", 1, 1, ((0, 4),)), 0) == []  # overtaken
        reports = made.encoded(self.KEY, [0], 0, 5)
        assert made.receive("lang", Want("r", 1, 2, ((0, 2),)), 0) == reports  # repeated
        assert made.receive("lang", Want("r", 1, 3, ((0, 4),)), 0) == [EncodeBlocks(self.KEY, ((1, 4),)), *reports]
        made.receive("lang", Release("r", 1), 0)
        assert made.receive("lang", Want("r", 1, 4, ()), 0) == []
        [unknown] = sent(made.receive("lang", Want("s", 9, 1, ()), 0))
        assert unknown.status == 503

    def test_abort_is_confirmed_when_the_last_write_has_ended(self):
        made = self.transferring()
        assert made.receive("lang", Abort("r", 1), 1) == []
        assert not made.may_write(self.KEY, 1)
        assert made.write_skipped(self.KEY, 1, [0], 1) == []
        assert made.written(self.KEY, 1, [WrittenBlock(1, CHECKSUM, 8)], 1) == [
            Forget(self.KEY),
            Send("lang", Aborted("r", 1)),
        ]
        assert made.receive("lang", Abort("r", 1), 2) == [Send("lang", Aborted("r", 1))]  # the first was lost
        assert made.receive("lang", Submit("r", 1, 60000, b"payload"), 2) == []  # it arrived late

    def test_abort_is_never_confirmed_after_a_write_that_may_still_land(self):
        made = self.transferring()
        error = Send("lang", Error("r", 1, 503, "timed out"))
        assert made.write_failed(self.KEY, 1, [0], "timed out", 1) == [error]
        assert made.receive("lang", Grant("r", 1, 1, ((0, 2),)), 1) == [error]
        assert made.written(self.KEY, 1, [WrittenBlock(1, CHECKSUM, 8)], 1) == [Forget(self.KEY)]
        assert made.receive("lang", Abort("r", 1), 1) == []
        assert made.receive("lang", Grant("r", 1, 1, ((0, 2),)), 1) == [error]

    def test_an_abort_that_overtakes_its_submit_wins(self):
        made = self.made()
        assert made.receive("lang", Abort("r", 1), 0) == [Send("lang", Aborted("r", 1))]
        assert made.receive("lang", Submit("r", 1, 60000, b"payload"), 0) == []

    def test_nothing_starts_after_the_deadline(self):
        made = self.transferring()
        assert made.next_timer() == 60
        assert made.may_write(self.KEY, 59.9)
        assert not made.may_write(self.KEY, 60)
        assert made.receive("lang", Grant("r", 1, 2, ((2, 0),)), 60) == []
        [error] = sent(made.tick(60))
        assert (error.status, made.next_timer()) == (504, None)
        made.written(self.KEY, 1, [WrittenBlock(0, CHECKSUM, 8)], 61)
        assert made.written(self.KEY, 1, [WrittenBlock(1, CHECKSUM, 8)], 61) == [Forget(self.KEY)]

    def test_grants_outside_the_prompt_or_the_pool_write_nothing(self):
        made = self.transferring()
        assert made.receive("lang", Grant("r", 1, 2, ((4, 0), (2, 4))), 0) == []

    def test_failures_reach_the_language_node(self):
        made = self.made(max_requests=1)
        made.receive("lang", Submit("r", 1, 60000, b""), 0)
        [full] = sent(made.receive("lang", Submit("s", 2, 60000, b""), 0))
        assert (full.status, "1 requests" in full.reason) == (503, True)
        error = Error("r", 1, 400, "no image")
        assert made.failed(self.KEY, 400, "no image", 0) == [Send("lang", error), Forget(self.KEY)]
        assert made.receive("lang", Submit("r", 1, 60000), 0) == [Send("lang", error)]
        [unknown] = sent(made.receive("lang", Grant("s", 9, 1, ((0, 0),)), 0))
        assert unknown.status == 503
        made.receive("lang", Submit("t", 3, 60000, b""), 0)
        empty = Prepared("t", 3, 0, 0, 0, FINGERPRINT)
        assert sent(made.prepared(AttemptKey("lang", "t", 3), empty, 0))[0].status == 400

    def test_a_lost_language_node_leaves_nothing_behind(self):
        made = self.transferring()
        made.peer_down("lang", 1)
        assert not made.may_write(self.KEY, 1)
        made.write_skipped(self.KEY, 1, [0], 1)
        assert made.write_failed(self.KEY, 1, [1], "refused", 1) == [Forget(self.KEY)]
        assert made.outgoing == {}
        assert made.receive("lang", Submit("s", 2, 60000, b""), 1) == []  # it must send Hello first

    def test_memory_of_finished_attempts_is_bounded(self):
        made = self.made()
        for attempt in range(5000):
            made.receive("lang", Abort("r", attempt), 0)
        assert len(made.finished) == 4096
