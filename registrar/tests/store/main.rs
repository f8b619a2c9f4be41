//! Every store behaves alike: one suite against each backend, and what is particular to a backend beside it.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod cluster;
mod compaction;
mod etcd;
mod etcd_auth;
mod harness;
mod member;
mod model;
mod relay;
mod sqlite_crash;
mod sqlite_file;
mod sqlite_fsync;
mod suite;
mod writers;

/// Makes a test of each function of the suite for each backend.
macro_rules! conformance {
    ($($name:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                crate::suite::$name(crate::harness::Harness::memory()).await;
            })*
        }
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                crate::suite::$name(crate::harness::Harness::sqlite()).await;
            })*
        }
        mod on_etcd {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                if let Some(harness) = crate::harness::Harness::etcd() {
                    crate::suite::$name(harness).await;
                }
            })*
        }
    };
}

conformance!(
    transactions_apply_all_or_nothing,
    conditions_judge_the_state_before,
    invalid_transactions_are_refused,
    revisions_count_up_by_one_for_each_change,
    ranges_end_where_they_should,
    pages_show_one_revision,
    a_watch_tells_the_past_and_the_future,
    a_watch_from_the_future_waits_for_it,
    a_watch_goes_on_across_a_restart,
    compaction_forgets_history_and_nothing_else,
    concurrent_writers_are_watched_exactly_once_in_order,
    one_of_many_conditional_writers_wins,
    large_values_pass_through_everything,
    an_announcement_lasts_as_long_as_it_is_held,
);
