//! What happens when two things happen at once: models of the core, each under many schedules.
//!
//! A model is a program of a few threads over the real queue, hub, bells and tickets, whose
//! assertions must hold however they meet. It runs in one of two ways:
//!
//! - With the feature `shuttle` the core is built with the checker's locks, atomics and channels
//!   (`src/sync.rs`). The checker runs one thread at a time, and decides at each step whose is next.
//!   A failed assertion, and threads that sleep for ever, end it with a schedule to `--replay`.
//! - Without it, on the system's threads, with crossbeam's channels and real descriptors: as many
//!   rounds as are asked for.
//!
//! `[--rounds N] [--seconds N] [--replay SCHEDULE] [MODEL …]`; `scripts/races.py` runs both.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod hub;
mod parts;
mod queue;
mod rendering;
mod ticket;
mod wake;

use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A program of a few threads that must hold whichever way they meet.
struct Model {
    name: &'static str,
    body: fn(),
}

/// What is run of each model.
struct Effort {
    rounds: usize,
    seconds: Duration,
}

fn models() -> Vec<Model> {
    [queue::MODELS, wake::MODELS, hub::MODELS, rendering::MODELS, ticket::MODELS]
        .into_iter()
        .flatten()
        .map(|(name, body)| Model { name, body: *body })
        .collect()
}

#[cfg(feature = "shuttle")]
mod runs {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
    use shuttle::{Config, MaxSteps, Runner};

    use super::*;

    /// One more than the times at which the second scheduler takes the turn away from who has the highest
    /// priority.
    const DEPTH: usize = 4;

    /// More steps than any model takes: a thread that runs in circles is a failure as well.
    const MOST_STEPS: usize = 200_000;

    const STACK: usize = 1 << 18;

    fn run(model: &Model, scheduler: impl Scheduler + 'static, seconds: Duration) -> Option<usize> {
        let mut config = Config::new();
        config.stack_size = STACK;
        config.max_steps = MaxSteps::FailAfter(MOST_STEPS);
        config.max_time = Some(seconds);
        config.silence_warnings = true;
        let runner = Runner::new(scheduler, config);
        catch_unwind(AssertUnwindSafe(|| runner.run(model.body))).ok()
    }

    /// By chance, then by priorities that change at a few points: half of the rounds each.
    pub fn check(model: &Model, effort: &Effort) -> Option<usize> {
        let (rounds, seconds) = (effort.rounds.div_ceil(2), effort.seconds / 2);
        let by_chance = run(model, RandomScheduler::new(rounds), seconds)?;
        Some(by_chance + run(model, PctScheduler::new(DEPTH, rounds), seconds)?)
    }

    pub fn replay(model: &Model, schedule: &str) -> bool {
        run(model, ReplayScheduler::new_from_encoded(schedule), Duration::MAX).is_some()
    }
}

#[cfg(not(feature = "shuttle"))]
mod runs {
    use std::sync::mpsc::{RecvTimeoutError, channel};

    use super::*;

    /// A round that takes so long has a thread that sleeps for ever.
    const PATIENCE: Duration = Duration::from_secs(60);

    pub fn check(model: &Model, effort: &Effort) -> Option<usize> {
        let (body, rounds, seconds) = (model.body, effort.rounds, effort.seconds);
        let (over, is_over) = channel();
        let running = std::thread::spawn(move || {
            let begun = Instant::now();
            let mut count = 0;
            while count < rounds && begun.elapsed() < seconds {
                body();
                count += 1;
                let _ = over.send(());
            }
            count
        });
        loop {
            match is_over.recv_timeout(PATIENCE) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => return running.join().ok(),
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("{}: a round has not ended for {PATIENCE:?}", model.name);
                    return None;
                }
            }
        }
    }

    pub fn replay(_: &Model, _: &str) -> bool {
        eprintln!("the system's threads repeat nothing: build with --features shuttle");
        false
    }
}

fn main() -> ExitCode {
    let mut effort = Effort { rounds: 100, seconds: Duration::from_secs(3600) };
    let (mut schedule, mut wanted) = (None, Vec::new());
    let mut arguments = std::env::args().skip(1);
    let number = |given: Option<String>| given.and_then(|n| n.parse().ok()).expect("a number");
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--rounds" => effort.rounds = number(arguments.next()),
            "--seconds" => effort.seconds = Duration::from_secs(number(arguments.next()) as u64),
            "--replay" => schedule = Some(arguments.next().expect("a schedule")),
            // Cargo's own.
            "--quiet" => {}
            name => wanted.push(name.to_owned()),
        }
    }
    let mut models = models();
    if let Some(unknown) = wanted.iter().find(|name| models.iter().all(|its| its.name != **name)) {
        let names: Vec<_> = models.iter().map(|its| its.name).collect();
        eprintln!("no such model: {unknown}; there are {}", names.join(", "));
        return ExitCode::from(2);
    }
    models.retain(|model| wanted.is_empty() || wanted.iter().any(|name| name == model.name));
    if let Some(schedule) = schedule {
        let held = models.iter().all(|model| runs::replay(model, &schedule));
        return if held { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    println!("| model | rounds | s | |\n| --- | ---: | ---: | --- |");
    let mut failed = 0;
    for model in &models {
        let begun = Instant::now();
        let ran = runs::check(model, &effort);
        failed += usize::from(ran.is_none());
        let (count, said) =
            ran.map_or(("-".to_owned(), "FAILED"), |count| (count.to_string(), "held"));
        let seconds = begun.elapsed().as_secs_f64();
        println!("| {} | {count} | {seconds:.1} | {said} |", model.name);
    }
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
