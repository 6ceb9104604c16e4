"""The 56 faults of the design's catalogue, and the tests that make each of them happen.

A row names its tests by node id (without parameters), and its negative control: a test that the same check fails where the protection is
taken away. Rows without a test say why; they count as not covered. ``test_catalogue.py`` holds the table and the suite together, and
`docs/faults.md` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_WALK = "tests/faults/test_walk.py::"
_CUT = "tests/faults/test_power_cut.py::"
_CHECKER = "tests/faults/test_checker.py::"
_SCHEDULES = "tests/faults/test_schedules.py::"
_LYING = "tests/faults/test_lying_s3.py::"
_CEPH = "tests/faults/test_ceph.py::"
_DISKS = "tests/faults/test_disks.py::"
_LINES = "tests/faults/test_lines.py::"
_ARCHIVE = "tests/storage/test_archive.py::"
_WORK = "tests/storage/test_work.py::"
_MOVER = "tests/storage/test_mover.py::"
_SQLITE = "tests/storage/test_sqlite.py::"
_POSTGRESQL = "tests/storage/test_postgresql.py::"
_KEYS = "tests/storage/test_study_keys.py::"
_KMS = "tests/storage/test_kms.py::"
_SCP = "tests/dicom_node/test_scp.py::"
_SCU = "tests/dicom_node/test_scu.py::"
_COURIER = "tests/dicom_node/test_courier.py::"
_COMMITMENT = "tests/dicom_node/test_courier_commitment.py::"
_SECURITY = "tests/dicom_node/test_security.py::"
_SINK = "tests/dicom_node/test_audit_sink.py::"
_WORKER = "tests/inference/test_worker.py::"
_KILLS = "tests/system/test_kills.py::"
_NODE = "tests/system/test_node.py::"
_LOG = "tests/system/test_log.py::"
_LOG_PIPE = "tests/dicom_node/test_log_pipe.py::"
_DEVICE = "tests/system/test_device.py::"
_UPGRADE = "tests/system/test_upgrade.py::"
_STOW = "tests/dicomweb/test_stow.py::"

ACK_BEFORE_COMMIT = _SCHEDULES + "test_a_dishonest_node_is_found_out"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row."""

    number: int
    what: str
    promises: str
    tests: tuple[str, ...]
    control: str = ""
    """Node id of the negative control."""
    missing: str = ""
    """Why there is no test, or what the tests leave out."""

    @property
    def covered(self) -> bool:
        """Whether a test makes it happen."""
        return bool(self.tests)


CATALOGUE: Final[tuple[Fault, ...]] = (
    Fault(
        1,
        "SIGKILL between receive, write, flush, rename, commit, answer",
        "P1 P2",
        (
            _WALK + "test_killed_at_every_step",
            _WALK + "test_killed_at_random_moments",
            _WALK + "test_killed_at_system_calls",
            _WALK + "test_killed_with_a_bucket",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _WALK + "test_dishonest_receiver_is_found_out",
    ),
    Fault(
        2,
        "power cut at each of those points",
        "P1 P2",
        (
            _CUT + "test_power_cut_at_each_step",
            _CUT + "test_power_cut_of_the_spool",
        ),
        _CUT + "test_power_cut_without_flushes_loses_instances",
    ),
    Fault(
        3,
        "power cut at the acknowledgement",
        "P1",
        (
            _CUT + "test_power_cut_at_the_acknowledgement_loses_nothing",
            _CUT + "test_power_cut_of_the_spool",
        ),
        _CUT + "test_power_cut_without_flushes_loses_instances",
    ),
    Fault(
        4,
        "SIGKILL at claim, put, row, infer, report, delivery",
        "P1 P3",
        (
            _WALK + "test_killed_at_every_step",
            _WALK + "test_killed_with_a_bucket",
            _KILLS + "test_killed_at_each_step",
            _KILLS + "test_random_kills_while_it_works",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        5,
        "SIGTERM with open associations",
        "P2 P7",
        (_SCP + "test_stop_drains_then_aborts",),
        _CHECKER + "test_a_doctored_history_is_caught",
    ),
    Fault(
        6,
        "acknowledgement lost on the wire",
        "P1 P3",
        (
            _LINES + "test_the_answer_is_lost_on_the_wire",
            _SCP + "test_same_again_is_success_and_one_copy",
        ),
        _LINES + "test_control_a_whole_line_needs_no_second_sending",
    ),
    Fault(
        7,
        "sender goes away in the middle",
        "P2",
        (
            _SCP + "test_broken_association_leaves_nothing",
            _ARCHIVE + "test_every_cut_is_refused",
            _ARCHIVE + "test_abort_leaves_nothing_and_says_nothing",
        ),
        ACK_BEFORE_COMMIT,
    ),
    Fault(
        8,
        "two senders, same instance, same moment",
        "P1 P3",
        (
            _SCP + "test_two_senders_of_one_instance",
            _ARCHIVE + "test_many_senders_of_one_instance_at_one_moment",
            _ARCHIVE + "test_two_senders_of_other_content_at_one_moment",
        ),
        _CHECKER + "test_a_doctored_history_is_caught",
    ),
    Fault(
        9,
        "S3 down at full ingest",
        "P1 P4",
        (
            _MOVER + "test_the_store_away_stops_nobody",
            _MOVER + "test_bytes_in_flight_are_limited_and_recover",
            _LYING + "test_down_and_back",
            _ARCHIVE + "test_store_down_then_back",
            _CEPH + "test_gateway_killed_under_load",
            _CEPH + "test_osd_killed_under_load",
        ),
        _LYING + "test_control_a_store_that_believes_is_caught",
        "minutes instead of an hour: nothing depends on the length",
    ),
    Fault(
        10,
        "S3 500, 502, 503 SlowDown, 429",
        "P3",
        (
            _LYING + "test_errors_at_a_rate",
            _LYING + "test_pauses_grow_have_jitter_and_heed_retry_after",
            _LYING + "test_passing_fault_is_ridden_out",
        ),
        _LYING + "test_control_random_faults",
    ),
    Fault(
        11,
        "S3 answers 200 and kept nothing, half, other bytes",
        "P1",
        (
            _LYING + "test_200_is_not_believed",
            _MOVER + "test_a_store_that_lies_keeps_the_spool",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _LYING + "test_control_a_store_that_believes_is_caught",
    ),
    Fault(
        12,
        "S3 BadDigest, RequestTimeout, connection cut at byte N",
        "P1",
        (
            _LYING + "test_passing_fault_is_ridden_out",
            _LYING + "test_passing_fault_in_parts_is_ridden_out",
            _LYING + "test_line_that_breaks",
            _LYING + "test_half_kept_and_the_answer_lost",
        ),
        _LYING + "test_control_a_store_that_believes_is_caught",
    ),
    Fault(
        13,
        "S3 hangs",
        "P4 P8",
        (
            _LYING + "test_hanging_service",
            _LYING + "test_hanging_service_stops_no_other",
            _LYING + "test_black_hole",
            _LYING + "test_bytes_that_come_too_slowly",
            _CEPH + "test_osd_stands_still_under_load",
        ),
        _LYING + "test_deadline_ends_repetitions",
    ),
    Fault(
        14,
        "S3 eventually consistent, 404 after PUT, wrong ETag",
        "P1",
        (
            _LYING + "test_never_visible",
            _LYING + "test_wrong_etag_of_parts",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _LYING + "test_control_a_store_that_believes_is_caught",
    ),
    Fault(
        15,
        "S3 credentials expired, 403, bucket missing",
        "P1 P4",
        (
            _LYING + "test_renewed_credentials_need_no_restart",
            _LYING + "test_refusal_says_what_to_do",
            "tests/storage/test_s3.py::test_missing_bucket",
            "tests/storage/test_s3.py::test_wrong_credentials",
        ),
        _LYING + "test_control_a_store_that_believes_is_caught",
    ),
    Fault(
        16,
        "S3 object deleted or rolled back out of band",
        "P1",
        (
            _LYING + "test_deleted_or_rolled_back_out_of_band",
            _ARCHIVE + "test_a_second_sending_heals_a_damaged_object",
            _ARCHIVE + "test_damage_is_an_alarm",
        ),
        _CHECKER + "test_a_real_run_passes_and_its_damages_are_caught",
    ),
    Fault(
        17,
        "multipart upload orphaned",
        "P4",
        (_LYING + "test_orphaned_uploads_are_cleaned", _LYING + "test_failed_upload_is_aborted"),
        _LYING + "test_control_random_faults",
    ),
    Fault(
        18,
        "spool disk full before, during, after a write",
        "P2",
        (
            _DISKS + "test_a_full_disk_refuses_and_recovers_alone",
            _ARCHIVE + "test_little_space_refuses_before_reading",
            _WALK + "test_calls_that_fail",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _DISKS + "test_control_a_disk_with_room_takes_the_same",
    ),
    Fault(
        19,
        "disk full on database and audit trail",
        "P2 P6",
        (
            _DISKS + "test_a_full_disk_of_the_database_refuses_and_recovers_alone",
            _SQLITE + "test_a_full_disk_fails_the_write_and_recovers",
            _LOG + "test_a_log_volume_that_is_full",
            _DISKS + "test_a_full_disk_of_postgresql_refuses_and_recovers",
            _DISKS + "test_no_room_in_postgresql_is_no_readiness",
        ),
        _DISKS + "test_control_postgresql_with_room_takes_the_same",
    ),
    Fault(
        20,
        "fsync returns EIO, once and for ever",
        "P2",
        (
            _WALK + "test_calls_that_fail",
            _ARCHIVE + "test_disk_errors_are_never_success",
            _SQLITE + "test_a_failed_flush_is_never_success",
        ),
        _CUT + "test_power_cut_without_flushes_loses_instances",
    ),
    Fault(
        21,
        "short write, EINTR, EMFILE, ENFILE",
        "P2",
        (
            _WALK + "test_calls_that_fail",
            _DISKS + "test_no_more_files_refuses_and_recovers_alone",
            _ARCHIVE + "test_disk_errors_are_never_success",
        ),
        _DISKS + "test_control_a_disk_with_room_takes_the_same",
    ),
    Fault(
        22,
        "read-only remount, landing folder removed",
        "P2 P4",
        (
            _DISKS + "test_a_read_only_disk_refuses_and_still_reads",
            _DISKS + "test_a_landing_folder_that_is_gone_refuses",
        ),
        _DISKS + "test_control_a_disk_with_room_takes_the_same",
    ),
    Fault(
        23,
        "bit rot in spool, store, database page",
        "P1",
        (
            _MOVER + "test_a_landed_object_that_rotted_is_an_alarm_and_heals_by_a_second_sending",
            _ARCHIVE + "test_damage_is_an_alarm",
            _ARCHIVE + "test_verify_and_orphans",
            _SQLITE + "test_a_flipped_bit_is_detected",
            "tests/storage/test_envelope.py::test_every_flipped_bit_is_refused",
        ),
        _CHECKER + "test_a_real_run_passes_and_its_damages_are_caught",
    ),
    Fault(
        24,
        "database locked or busy",
        "P2 P4",
        (
            _SQLITE + "test_a_lock_held_by_another_process_ends_in_unavailable",
            _SQLITE + "test_check_names_a_writer_that_is_stuck",
            _POSTGRESQL + "test_a_lock_held_by_another_session_ends_in_unavailable",
            _POSTGRESQL + "test_a_node_that_hangs_loses_its_turn",
        ),
        ACK_BEFORE_COMMIT,
    ),
    Fault(
        25,
        "database corrupt, missing, older, restored",
        "P1",
        (
            _SQLITE + "test_a_missing_file_is_not_made_by_accident",
            _SQLITE + "test_a_flipped_bit_is_detected",
            "tests/storage/test_reindex.py::test_the_index_is_rebuilt_row_for_row",
            "tests/storage/test_reindex.py::test_what_has_landed_alone_is_found_too",
            "tests/storage/test_orphans.py::test_what_an_older_database_does_not_know_is_adopted",
        ),
        "tests/storage/test_reindex.py::test_differences_are_found",
    ),
    Fault(
        26,
        "schema migration killed half-way",
        "P7",
        (
            "tests/storage/test_migrations.py::test_a_killed_migration_is_undone_and_repeated",
            "tests/storage/test_copying.py::test_a_killed_copy_is_refused_and_repeated",
        ),
        "tests/storage/test_copying.py::test_a_difference_is_found_and_the_copy_stays_unusable",
    ),
    Fault(
        27,
        "worker crash",
        "P3 P8",
        (
            _KILLS + "test_killed_at_each_step",
            _WORKER + "test_a_killed_worker_loses_and_doubles_nothing",
            _WORK + "test_poison_that_kills_its_workers_ends_dead",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        28,
        "worker killed for memory",
        "P8",
        (
            "tests/system/test_memory.py::test_the_kernel_kills_the_worker_for_memory",
            "tests/inference/test_device.py::test_no_memory_is_another_try_and_no_report",
            _NODE + "test_killed_children_come_back",
            _KILLS + "test_random_kills_while_it_works",
        ),
        "tests/system/test_memory.py::test_control_with_memory_enough_nobody_is_killed",
        "a memory cgroup is filled where root may make one of version 1",
    ),
    Fault(
        29,
        "worker hangs",
        "P3 P8",
        (
            _NODE + "test_hanging_child_is_replaced",
            _WORK + "test_a_heartbeat_keeps_the_lease_and_silence_loses_it",
            _WORKER + "test_a_lost_lease_drops_the_result",
        ),
        _WORKER + "test_the_lease_is_renewed_while_the_work_lasts",
    ),
    Fault(
        30,
        "poison image kills every worker",
        "P3",
        (
            _WORK + "test_poison_that_kills_its_workers_ends_dead",
            _WORK + "test_a_death_is_told_in_its_own_transaction",
            "tests/dicom_node/test_node.py::test_a_job_whose_workers_died_is_in_the_audit_trail",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        31,
        "model file missing, digest wrong, load fails",
        "P3 P8",
        (
            "tests/inference/test_bundle.py::test_missing_files_are_named",
            "tests/inference/test_bundle.py::test_other_weights_are_refused_without_a_pin",
            "tests/inference/test_bundle.py::test_pin_is_checked",
            _WORKER + "test_a_model_that_fails_is_tried_again",
        ),
        "tests/inference/test_bundle.py::test_no_flipped_bit_passes_a_pin",
    ),
    Fault(
        32,
        "model changed in the middle of a job",
        "P3",
        (_WORKER + "test_a_new_model_replaces_the_report_and_names_it",),
        _ARCHIVE + "test_conclude_refuses_another_report_of_the_same_uid",
    ),
    Fault(
        33,
        "GPU lost",
        "P8",
        (
            _DEVICE + "test_the_device_is_lost_in_mid_run",
            _DEVICE + "test_a_gpu_is_asked_for_and_there_is_none",
            "tests/inference/test_device.py::test_a_lost_device_costs_no_try_and_writes_no_report",
            "tests/inference/test_device.py::test_a_picture_that_fails_every_device_ends_dead",
        ),
        "tests/inference/test_device.py::test_control_what_a_model_cannot_digest_is_an_item_of_the_report",
        "no GPU was pulled out: a failpoint raises what torch raises of one",
    ),
    Fault(
        34,
        "destination refuses connection, association, context",
        "P3",
        (
            _SCU + "test_unreachable_peers",
            _SCU + "test_no_accepted_context_is_refused_by_name",
            _COURIER + "test_a_peer_that_is_away_delays_no_other",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        35,
        "destination aborts, answers A700, B000, 0122, garbage, nothing",
        "P3",
        (
            _SCU + "test_broken_associations",
            _SCU + "test_refusals_say_whether_to_retry",
            _SCU + "test_success_and_warnings_are_stored",
            _SCU + "test_silent_peer_times_out",
            _COURIER + "test_out_of_resources_is_tried_again",
            _COURIER + "test_refusal_ends_the_job_with_its_reason",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        36,
        "destination acknowledges and loses",
        "P3",
        (
            _COMMITMENT + "test_what_the_peer_lost_is_sent_again",
            _COMMITMENT + "test_only_what_was_lost_is_sent_again",
            _COMMITMENT + "test_a_peer_that_never_reports",
            _COMMITMENT + "test_killed_while_asking",
        ),
        control=_COMMITMENT + "test_a_peer_that_is_not_to_be_asked",
    ),
    Fault(
        37,
        "destination down for three days",
        "P4 P8",
        (
            _WORK + "test_the_default_delay_grows_and_outlasts_three_days",
            _COURIER + "test_a_peer_that_is_away_delays_no_other",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        38,
        "result delivered twice",
        "P3",
        (
            _COURIER + "test_lost_acknowledgement_delivers_the_same_again",
            _KILLS + "test_killed_at_each_step",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _CHECKER + "test_a_doctored_history_is_caught",
    ),
    Fault(
        39,
        "STOW client cut at byte N, then again",
        "P1",
        (
            _STOW + "test_a_client_that_hangs_up",
            _STOW + "test_a_body_without_its_end",
            _STOW + "test_again_is_success_and_one_copy",
        ),
        ACK_BEFORE_COMMIT,
    ),
    Fault(
        40,
        "slow network, latency, resets",
        "P4",
        (_LINES + "test_a_slow_line_is_slow_and_nothing_else", _LINES + "test_a_line_that_is_reset_again_and_again"),
        _LINES + "test_control_a_whole_line_needs_no_second_sending",
    ),
    Fault(
        41,
        "network split to S3, database, destination",
        "P4",
        (
            _LYING + "test_black_hole",
            _POSTGRESQL + "test_a_server_that_hangs_is_given_up",
            _POSTGRESQL + "test_a_fail_over_is_waited_for",
            _POSTGRESQL + "test_terminated_backends_cost_nothing",
            _SCU + "test_silent_peer_times_out",
        ),
        ACK_BEFORE_COMMIT,
    ),
    Fault(
        42,
        "clock steps",
        "P3 P6",
        (
            _WORK + "test_a_clock_put_back_stops_nothing",
            _WORK + "test_a_clock_put_forward_gives_no_second_result",
            _WORK + "test_a_process_started_after_the_clock_was_put_back",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        43,
        "server certificate expires, is renewed on disk",
        "P4",
        (
            "tests/interop/test_tls.py::test_certificate_swapped_under_load",
            _SECURITY + "test_new_pair_is_taken_up",
            _SECURITY + "test_expiry_is_warned_of",
        ),
        control=_SECURITY + "test_bad_new_files_are_refused_and_the_old_kept",
        missing="the HTTP door has no TLS of its own: the proxy's",
    ),
    Fault(
        44,
        "client CA rotated, CRL stale",
        "P4",
        (
            _SECURITY + "test_bad_revocation_list_closes_the_door",
            _SECURITY + "test_revoked_certificate_is_refused",
            _SECURITY + "test_no_session_outlives_a_revocation",
            _SCP + "test_credentials_that_end_end_associations",
        ),
        control=_SECURITY + "test_mutual_tls_by_default",
    ),
    Fault(
        45,
        "data key missing at start, at read",
        "P5",
        (
            _NODE + "test_missing_key_ring_is_refused_never_replaced",
            "tests/storage/test_keys.py::test_a_lost_ring_makes_no_new_keys",
            "tests/storage/test_keys.py::test_damaged_ring",
            _SQLITE + "test_no_database_without_a_whole_key",
        ),
        _CHECKER + "test_a_real_run_passes_and_its_damages_are_caught",
    ),
    Fault(
        46,
        "wrapping key rotated at ingest, killed in between",
        "P1 P5",
        (
            _WALK + "test_killed_while_rotating",
            _KEYS + "test_killed_while_rotating",
            _KEYS + "test_rotation_while_others_seal_and_read",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        47,
        "key service down",
        "P4 P5",
        (
            _KMS + "test_gone_and_back",
            _KMS + "test_only_the_first_waits",
            _KEYS + "test_key_service_away",
            _KEYS + "test_rotation_with_the_service_failing",
        ),
        ACK_BEFORE_COMMIT,
    ),
    Fault(
        48,
        "audit sink away for a day, audit disk full, killed in mid-record",
        "P6",
        (
            _SINK + "test_the_sink_is_away_and_comes_back",
            _SINK + "test_killed_in_mid_record",
            _SINK + "test_what_was_not_confirmed_is_sent_again",
            _SINK + "test_who_takes_nothing_holds_nothing_up",
            "tests/system/test_audit_elsewhere.py::test_away_then_too_much_then_back",
            _DISKS + "test_a_full_disk_of_the_database_refuses_and_recovers_alone",
            "tests/storage/test_audit.py::test_an_event_lives_and_dies_with_its_transaction",
            _ARCHIVE + "test_refusal_stands_when_it_cannot_be_recorded",
        ),
        _SINK + "test_control_who_believes_that_sent_is_taken_loses_records",
        "seconds instead of a day: the trail is the queue, nothing depends on the length",
    ),
    Fault(
        49,
        "audit syslog peer has a wrong certificate",
        "P6",
        (
            _SINK + "test_a_wrong_certificate_gets_nothing",
            _SINK + "test_a_certificate_of_ours_where_one_is_asked_for",
            _SINK + "test_no_canary_is_readable_on_the_wire",
        ),
        _SINK + "test_control_who_does_not_verify_sends_to_anybody",
    ),
    Fault(
        50,
        "two nodes on one folder or database by mistake",
        "P1",
        (
            _NODE + "test_a_second_node_on_the_same_folder_is_refused",
            "tests/dicom_node/test_node.py::test_roles_alone_share_a_folder_and_a_whole_node_does_not",
            "tests/dicom_node/test_node.py::test_a_database_of_another_ring_is_refused",
            "tests/system/test_many_nodes.py::test_a_clone_with_the_same_host_and_path_is_refused",
            "tests/system/test_many_nodes.py::test_a_node_that_was_replaced_ends_at_once",
            _ARCHIVE + "test_sweep_spares_the_living",
        ),
        _CHECKER + "test_a_doctored_state_is_caught",
    ),
    Fault(
        51,
        "upgrade N to N+1 to N with items in flight",
        "P1 P7",
        (
            _UPGRADE + "test_an_upgrade_with_work_under_way",
            _UPGRADE + "test_the_older_version_refuses_and_changes_nothing",
        ),
        _UPGRADE + "test_control_a_schema_that_is_neither_is_found_out",
        "the older schema by its own migrations: there is no released program before this one",
    ),
    Fault(
        52,
        "long soak: threads, descriptors, memory, files",
        "P4",
        (_SCP + "test_threads_end_with_their_associations", _SCHEDULES + "test_nothing_is_left_of_the_stage"),
        ACK_BEFORE_COMMIT,
        "`make soak` runs as long as told; nobody has run it for seven days",
    ),
    Fault(
        53,
        "overload",
        "P2 P8",
        (
            _SCP + "test_limits_on_associations",
            _MOVER + "test_bytes_in_flight_are_limited_and_recover",
            _STOW + "test_too_many_uploads",
            "tests/dicomweb/test_door.py::test_too_many_requests",
        ),
        _CHECKER + "test_a_doctored_history_is_caught",
    ),
    Fault(
        54,
        "erasure races with reading, analysis, delivery",
        "P1",
        (
            "tests/storage/test_erasure.py::test_readers_and_senders_beside_an_erasure",
            "tests/storage/test_erasure.py::test_an_analysis_under_way_brings_nothing_back",
            "tests/storage/test_erasure.py::test_a_delivery_under_way_ends",
            "tests/storage/test_erasure.py::test_killed_at_each_step",
            _SCHEDULES + "test_random_schedules_break_no_promise",
        ),
        _CHECKER + "test_an_erased_instance_may_be_gone",
    ),
    Fault(
        55,
        "backup and full restore on an empty machine",
        "P1",
        (
            "tests/storage/test_reindex.py::test_the_index_is_rebuilt_row_for_row",
            "tests/storage/test_orphans.py::test_what_an_older_database_does_not_know_is_adopted",
        ),
        "tests/storage/test_reindex.py::test_differences_are_found",
    ),
    Fault(
        56,
        "log volume full, log pipe stuck",
        "P4",
        (
            _LOG + "test_a_log_pipe_that_is_stuck",
            _LOG + "test_a_log_volume_that_is_full",
            _LOG_PIPE + "test_a_stuck_reader_stops_nobody_and_what_is_lost_is_told",
            _LOG_PIPE + "test_what_cannot_be_written_is_lost_and_kills_nobody",
            _LOG_PIPE + "test_every_line_is_written_or_counted",
        ),
        _LOG_PIPE + "test_control_without_the_pipe_a_stuck_reader_stops_the_process",
    ),
)
