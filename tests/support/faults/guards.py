"""What keeps tasks safe, guard by guard: where it stands, what would stand there without it, and the tests that then fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[3]

_CLAIMS: Final = "tests/integration/test_storage_claims.py::"
_FENCES: Final = "tests/integration/test_storage_fences.py::"
_SINGLES: Final = "tests/integration/test_storage_singles.py::"
_RESCUE: Final = "tests/integration/test_storage_rescue.py::"
_LEADER: Final = "tests/integration/test_storage_leader.py::"
_LEAVES: Final = "tests/integration/test_storage_leaves.py::"
_ARCHIVE: Final = "tests/integration/test_storage_archive.py::"
_RULES: Final = "tests/integration/test_rules.py::"
_RACES: Final = "tests/integration/test_rules_races.py::"
_INTERLEAVED: Final = "tests/integration/test_rules_fences.py::"
_MOVES: Final = "tests/integration/test_client_actions_races.py::"
_ACTIONS: Final = "tests/integration/test_client_actions.py::"
_RESULTS: Final = "tests/integration/test_results.py::"
_EXPIRY: Final = "tests/integration/test_expiry.py::"
_TX: Final = "tests/integration/test_complete_tx.py::"
_OTHERS_TX: Final = "tests/integration/test_complete_tx_others.py::"
_STORED_TX: Final = "tests/integration/test_storage_tx.py::"
_STOP: Final = "tests/faults/test_process_stop.py::"

_LEADS: Final = "EXISTS (SELECT FROM fastq.leader WHERE holder = $1::bigint AND term = $2::bigint)"
#: The same parameters, and no question.
_LEADS_NOT: Final = "$1::bigint IS NOT NULL AND $2::bigint IS NOT NULL"


@dataclass(frozen=True, slots=True)
class Guard:
    """One guard."""

    name: str
    file: str
    """Where it stands, from the root of the source tree."""
    changes: tuple[tuple[str, str], ...]
    """How it is taken out: texts that stand there exactly once each, and what takes their places."""
    tests: tuple[str, ...]
    """Each of them fails without it."""

    def taken_out(self) -> str:
        """The file's text without it.

        Raises:
            ValueError: the file no longer says what is to be taken out.
        """
        text = (ROOT / self.file).read_text()
        for old, new in self.changes:
            if text.count(old) != 1:
                raise ValueError(f"{self.file} has {text.count(old)} times what is to be taken out: {old}")
            text = text.replace(old, new)
        return text


def _sql(name: str, statement: str, old: str, new: str, *tests: str) -> Guard:
    return Guard(name, f"sql/queries/{statement}.sql", ((old, new),), tests)


def _rust(name: str, file: str, old: str, new: str, *tests: str) -> Guard:
    return Guard(name, f"rust/src/{file}.rs", ((old, new),), tests)


GUARDS: Final = (
    # --- fences: the claim says what may still be ended ---
    _sql(
        "completion: only what the claim holds",
        "complete_tasks",
        "h.ids * s.ids AS ok",
        "s.ids AS ok",
        _CLAIMS + "test_a_flush_and_a_give_back_of_one_claim_both_count",
    ),
    _sql(
        "completion: decides on the locked row",
        "complete_tasks",
        "c.no = s.no FOR NO KEY UPDATE",
        "c.no = s.no",
        _CLAIMS + "test_two_flushes_of_one_claim_both_count",
    ),
    _sql(
        "completion of one: only what the claim holds alone",
        "complete_task",
        "ids = int8multirange(int8range($3::bigint, $3, '[]')) RETURNING",
        "$3::bigint > 0 RETURNING",
        _SINGLES + "test_it_counts_only_for_the_claim_that_holds_that_task_and_no_other",
    ),
    _sql(
        "results: only of what the claim holds",
        "complete_with_results",
        "WHERE m.ok @> r.id",
        "WHERE r.id IS NOT NULL",
        _RESULTS + "test_only_results_of_what_the_claim_holds_are_stored",
    ),
    _sql(
        "failure: only what the claim holds",
        "fail_tasks",
        " WHERE h.ids @> s.id",
        "",
        _FENCES + "test_rule_1_a_failure_counts_only_for_what_its_claim_still_holds",
    ),
    _sql(
        "failure: decides on the locked row",
        "fail_tasks",
        "c.no = s.no FOR NO KEY UPDATE",
        "c.no = s.no",
        _FENCES + "test_two_flushes_of_failures_of_one_claim_both_count",
    ),
    _sql(
        "snooze: only what the claim holds",
        "snooze_tasks",
        " WHERE h.ids @> s.id",
        "",
        _FENCES + "test_rule_1_a_snooze_counts_only_for_what_its_claim_still_holds",
    ),
    _sql(
        "snooze: decides on the locked row",
        "snooze_tasks",
        "c.no = s.no FOR NO KEY UPDATE",
        "c.no = s.no",
        _FENCES + "test_a_snooze_that_waits_for_a_flush_of_its_claim_decides_on_what_that_left",
    ),
    _sql(
        "expiry: only what the claim holds",
        "expire_claimed",
        " WHERE h.ids @> s.id",
        "",
        _FENCES + "test_rule_1_only_what_its_claim_still_holds_expires",
    ),
    _sql(
        "expiry: decides on the locked row",
        "expire_claimed",
        "c.no = s.no FOR NO KEY UPDATE",
        "c.no = s.no",
        _FENCES + "test_an_expiry_that_waits_for_a_flush_of_its_claim_decides_on_what_that_left",
    ),
    Guard(
        "expiry: what waits for a time goes in with the rest",
        "rust/src/engine/produce/batch.rs",
        (
            (
                "let (opened, wait, date, committed) = tokio::join!(opening, wait, date, commit);",
                "let (opened, wait, committed) = tokio::join!(opening, wait, commit);\n            let date = date.await;",
            ),
        ),
        (_EXPIRY + "test_a_call_of_many_goes_in_at_once[False]",),
    ),
    _sql(
        "give back: only what the claim holds",
        "give_back_tasks",
        "h.ids * s.ids AS ok",
        "s.ids AS ok",
        _FENCES + "test_rule_1_only_what_a_claim_still_holds_is_given_back",
    ),
    _sql(
        "give back: decides on the locked row",
        "give_back_tasks",
        "c.no = s.no FOR NO KEY UPDATE",
        "c.no = s.no",
        _FENCES + "test_a_give_back_that_waits_for_a_flush_counts_for_the_rest",
    ),
    # --- what clients do to tasks ---
    _sql(
        "cancel: decides on the locked claim",
        "cancel_claimed",
        "ORDER BY consumer, no FOR NO KEY UPDATE",
        "ORDER BY consumer, no",
        _MOVES + "test_a_completion_in_flight_comes_first",
    ),
    _sql(
        "retry: leaves no second copy",
        "retry_dead",
        "DELETE FROM fastq.task WHERE id = ANY (ARRAY (SELECT id FROM gone))",
        "SELECT FROM gone",
        _ACTIONS + "test_a_retried_task_runs",
    ),
    _sql(
        "delete: a row of completions keeps its first id",
        "delete_done",
        "lo = (SELECT lower(p.rest) FROM parts p WHERE p.lo = d.lo)",
        "lo = d.lo",
        _ACTIONS + "test_completed_tasks_of_one_flush_are_deleted_one_by_one",
    ),
    Guard(
        "what moved backwards is looked for again",
        "python/fastq/_actions.py",
        (("PASSES: Final = 5", "PASSES: Final = 1"),),
        (
            _MOVES + "test_a_failure_in_flight_that_is_to_be_retried_is_cancelled_where_it_waits",
            _MOVES + "test_two_tasks_of_one_flush_deleted_at_once",
        ),
    ),
    # --- claims ---
    _sql(
        "claim: locks chunks",
        "claim_tasks",
        " FOR NO KEY UPDATE SKIP LOCKED",
        "",
        _CLAIMS + "test_two_claimers_of_one_chunk_never_share_a_task",
    ),
    _sql(
        "claim of one: locks its chunk",
        "claim_task",
        " FOR NO KEY UPDATE SKIP LOCKED",
        "",
        _SINGLES + "test_a_late_claim_takes_no_task_that_another_took",
    ),
    _sql(
        "claim: passes over locked chunks",
        "claim_tasks",
        "FOR NO KEY UPDATE SKIP LOCKED",
        "FOR NO KEY UPDATE",
        _CLAIMS + "test_a_claim_locks_no_more_chunks_than_it_may",
    ),
    Guard(
        "claim: changes chunks by hi, not by ctid",
        "sql/queries/claim_tasks.sql",
        (
            ("SELECT q.rid, q.lo,", "SELECT q.ctid AS at, q.rid, q.lo,"),
            (
                "r.hi = ANY (ARRAY (SELECT hi FROM take WHERE upto < hi))",
                "r.ctid = ANY (ARRAY (SELECT at FROM take WHERE upto < hi))",
            ),
        ),
        (_CLAIMS + "test_two_claimers_of_one_chunk_never_share_a_task",),
    ),
    _rust(
        "claim: numbers are never used twice",
        "engine/consume/claim",
        "            books.last_no += asked.limit + 1;\n",
        "",
        _RULES + "test_rule_2_a_killed_worker_is_charged_for_what_ran_and_not_for_what_it_held",
    ),
    _rust(
        "claim: what came in a dead name is not started",
        "engine/consume/claim",
        "        if current {\n            self.hand_over(&chunks);",
        "        if current || true {\n            self.hand_over(&chunks);",
        _INTERLEAVED + "test_rule_1_what_a_claim_brings_after_it_was_rescued_is_not_started",
    ),
    _rust(
        "claim: one under way is no lost one",
        "engine/consume/books",
        "is_old(*no) && !self.held.contains(no)",
        "!self.held.contains(no)",
        _INTERLEAVED + "test_a_claim_whose_answer_is_under_way_is_not_given_back_by_the_heartbeat",
    ),
    # --- a worker that was away ---
    _rust(
        "start: the deadline, in a thread",
        "engine/consume/sched/slot",
        "        if !may_start() {",
        "        if false && !may_start() {",
        _INTERLEAVED + "test_rule_3_a_thread_starts_no_more_of_its_batch_once_the_deadline_has_passed",
    ),
    _rust(
        "start: the deadline, on an event loop",
        "engine/consume/sched/runs",
        "let may_start = may_start();",
        "let may_start = may_start() || true;",
        _STOP + "test_a_worker_that_is_stopped_between_two_starts_of_a_batch_starts_no_more_of_it[async]",
    ),
    _rust(
        "expiry: asked at each start, in a thread",
        "engine/consume/sched/slot",
        "if task.is_over(now) {",
        "if false && task.is_over(now) {",
        _EXPIRY + "test_a_claim_runs_none_whose_time_is_over",
        _EXPIRY + "test_what_was_claimed_in_advance_is_not_started_late",
    ),
    _rust(
        "expiry: asked at each start, on an event loop",
        "engine/consume/sched/runs",
        "let is_over = found.task.is_over(now);",
        "let is_over = false && found.task.is_over(now);",
        _EXPIRY + "test_async_handlers_start_none_late",
    ),
    # --- death and rescue ---
    _rust(
        "death: silence counts only in contact",
        "engine/consume/upkeep",
        'if self.is_in_contact() { row.get("silent") } else { Vec::new() }',
        'row.get("silent")',
        _INTERLEAVED + "test_rule_3_a_leader_that_is_back_first_declares_nobody_dead_for_its_own_absence",
    ),
    _sql(
        "death: only of who is silent still",
        "declare_dead",
        " AND beat_at < statement_timestamp() - $3::double precision * interval '1 second'",
        " AND $3::double precision IS NOT NULL",
        _RESCUE + "test_rule_3_a_beating_worker_keeps_its_claim_however_old_it_is",
    ),
    _sql(
        "rescue: a beat names what runs under claims that it knew",
        "rescue_claims",
        "c.no <= coalesce(k.last_no, c.no)",
        "c.no IS NOT NULL",
        "tests/acceptance/test_charges.py::test_a_run_that_ended_is_not_charged_to_the_next_one_that_never_began",
    ),
    _sql(
        "death: a beat does not end it",
        "beat_consumer",
        " AND dead_at IS NULL",
        "",
        _RESCUE + "test_rule_3_a_worker_that_was_declared_dead_is_told_at_its_next_beat",
    ),
    _rust(
        "death: what a dead name claimed is left to others",
        "engine/consume/books",
        "!self.is_lost() && self.epoch() == epoch",
        "self.epoch() == epoch",
        _RACES + "test_what_a_dead_name_claimed_and_gets_while_its_worker_registers_anew_is_left_to_others",
    ),
    _rust(
        "alone: nothing is saved for others while one waits to run alone",
        "engine/consume/sched",
        "        self.alone = true;\n        self.release_saved();",
        "        self.alone = true;",
        "tests/integration/test_rules_careful.py::test_a_careful_task_and_one_that_runs_alone_that_wait_for_the_same_slot_both_run",
    ),
    _sql(
        "rescue: only claims of the dead",
        "rescue_claims",
        "(k.id IS NULL OR k.dead_at IS NOT NULL)",
        "(k.id IS NULL OR true)",
        _RESCUE + "test_rule_3_a_beating_worker_keeps_its_claim_however_old_it_is",
    ),
    _sql(
        "rescue: passes over a claim being flushed",
        "rescue_claims",
        "FOR UPDATE OF c SKIP LOCKED",
        "FOR UPDATE OF c",
        _RESCUE + "test_a_rescue_passes_over_a_claim_that_is_being_flushed",
    ),
    _sql(
        "rescue: what may not have run is not charged",
        "rescue_claims",
        "(ids - ran, greatest(track - 2, 0))",
        "(ids - ran, least(greatest(track - 1, 0), 1))",
        "tests/integration/test_rules_careful.py::"
        "test_rule_2_beside_a_killer_on_track_2_nobody_is_charged_without_a_start",
    ),
    _rust(
        "alone: only once all results are stored",
        "engine/consume/claim/careful",
        "hold_for_alone() && self.shared.outcomes.unflushed() == 0",
        "hold_for_alone()",
        _RULES + "test_rule_2_what_ran_alone_is_stored_before_the_next_starts",
    ),
    # --- the leader ---
    _sql(
        "lease: one that lasts is not taken",
        "tick",
        "\n     WHERE l.expires_at < clock_timestamp() OR l.holder = excluded.holder",
        "",
        _LEADER + "test_of_two_that_take_an_expired_lease_one_gets_it",
    ),
    *(
        _sql(
            f"{statement}: the leader's term",
            statement,
            _LEADS,
            _LEADS_NOT,
            f"tests/integration/test_storage_terms.py::test_only_the_leader_does_upkeep[{statement}]",
        )
        for statement in (
            "declare_dead",
            "rescue_claims",
            "forget_consumers",
            "promote_tasks",
            "postpone_task",
            "open_leaf",
            "move_chunks",
            "carry_delayed",
            "check_leaf_empty",
            "purge_dead",
            "purge_done",
            "purge_errors",
            "purge_tokens",
        )
    ),
    _sql(
        "resign_leader: the leader's term",
        "resign_leader",
        "holder = $1::bigint AND term = $2::bigint",
        "$1::bigint IS NOT NULL AND $2::bigint IS NOT NULL",
        "tests/integration/test_storage_terms.py::test_only_the_leader_does_upkeep[resign_leader]",
    ),
    _sql(
        "promotion: each task once",
        "promote_tasks",
        " FOR UPDATE SKIP LOCKED",
        "",
        _LEADER + "test_two_leaders_at_once_promote_each_task_once",
    ),
    # --- leaves ---
    _sql(
        "open leaf: decides on the locked row",
        "open_leaf",
        "     FOR NO KEY UPDATE\n",
        "",
        _LEADER + "test_two_leaders_at_once_open_one_leaf",
    ),
    _sql(
        "move: passes over chunks that a claim holds",
        "move_chunks",
        " FOR UPDATE SKIP LOCKED",
        "",
        _LEAVES + "test_a_chunk_that_a_claim_holds_is_passed_over",
    ),
    # No more than that: whoever waits for the row finds it gone, or writes the same content once more.
    _sql(
        "carry: passes over delayed tasks that somebody holds",
        "carry_delayed",
        " FOR UPDATE SKIP LOCKED",
        "",
        _LEAVES + "test_a_delayed_task_that_somebody_holds_is_passed_over",
    ),
    _sql(
        "leaf: locked before it is asked for",
        "lock_leaf",
        "IN SHARE ROW EXCLUSIVE MODE",
        "IN ACCESS SHARE MODE",
        _LEAVES + "test_a_late_commit_into_a_closed_leaf_is_waited_for_and_seen",
    ),
    *(
        _sql(
            f"leaf: kept while {table} names it",
            "check_leaf_empty",
            f"   AND NOT EXISTS (SELECT FROM fastq.{table} WHERE leaf = $3){end}",
            end.removesuffix("\n"),
            _LEAVES + f"test_a_leaf_that_something_names_is_not_emptied[{table}]",
        )
        for table, end in (("claim", "\n"), ("delayed", "\n"), ("ready", " AS may_go"))
    ),
    # --- completed in the handler's own transaction ---
    Guard(
        "own transaction: without its claim there is nothing to commit",
        "python/fastq/_tx/completing.py",
        (("if ended == [self._no]:", "if ended is not None:"),),
        (
            "tests/acceptance/test_transactions.py::test_idle_of_a_run_that_has_lost_its_task[sync-cancel-found out by the statement]",
            "tests/acceptance/test_transactions.py::test_idle_of_a_run_that_has_lost_its_task[async-rescue-found out by the statement]",
            "tests/acceptance/test_transactions.py::test_racing_what_others_have_begun[sync-cancel-the statement waits-commit]",
        ),
    ),
    _sql(
        "own transaction: nobody waits for its end",
        "settle_tx",
        "FOR UPDATE SKIP LOCKED",
        "FOR UPDATE",
        _STORED_TX + "test_a_transaction_that_is_open_is_waited_for_by_nobody",
        _TX + "test_an_open_transaction_holds_up_no_neighbour_of_its_claim",
    ),
    _sql(
        "own transaction: once it is judged, its statements come too late",
        "settle_tx",
        "SET no = f.fresh",
        "SET no = f.no",
        _STORED_TX + "test_a_transaction_that_was_rolled_back_can_not_come_late",
    ),
    _rust(
        "own transaction: a task with a claim of its own was not cancelled",
        "engine/consume/cancel",
        "        shared.tx.add_held(epoch, &mut held);\n",
        "",
        _OTHERS_TX + "test_nobody_takes_a_long_run_for_cancelled",
    ),
    # --- the archive ---
    *(
        _sql(
            f"{statement}: the leader's term",
            statement,
            _LEADS,
            _LEADS_NOT,
            _ARCHIVE + "test_a_leader_of_yesterday_archives_nothing",
        )
        for statement in ("archive_done", "archive_dead")
    ),
    _sql(
        "archive: a leaf is kept while a completion is left in it",
        "check_leaf_archived",
        "SELECT NOT EXISTS (",
        "SELECT true OR NOT EXISTS (",
        _ARCHIVE + "test_a_leaf_whose_archive_was_given_up_stays",
        _ARCHIVE + "test_what_completes_after_the_copy_keeps_the_leaf",
    ),
    _rust(
        "archive: asked under the leaf's lock",
        "engine/consume/retain",
        "if let Some((queues, _, archived)) = self.kept.archived() {",
        "if let Some((queues, _, archived)) = self.kept.archived().filter(|_| false) {",
        "tests/integration/test_archive.py::test_what_completes_behind_the_copy_is_archived_too",
    ),
    *(
        _sql(
            f"{statement}: waits for nobody's transaction",
            statement,
            " FOR UPDATE SKIP LOCKED",
            "",
            test,
        )
        for statement, test in (
            ("archive_done", _ARCHIVE + "test_what_a_client_holds_is_passed_by"),
            (
                "purge_done",
                "tests/integration/test_storage_retention.py::test_completed_tasks_that_a_client_holds_are_passed_by",
            ),
        )
    ),
    # --- results and enqueues in doubt ---
    _rust(
        "result in doubt: looked up before it counts as refused",
        "engine/consume/complete",
        "if flush.in_doubt && !gone.is_empty() {",
        "if false && !gone.is_empty() {",
        _RACES + "test_a_result_in_doubt_counts_once_and_nothing_runs_twice",
    ),
    _rust(
        "enqueue in doubt: on disk before it is answered",
        "engine/produce/flight",
        '                    link.execute("flush_log", &[]).await?;\n                    return Ok(Some(true));',
        "                    return Ok(Some(true));",
        "tests/integration/test_enqueue_flush.py::test_what_is_found_is_flushed_before_it_is_answered",
    ),
)
