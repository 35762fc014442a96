//! One file per job, `<state_dir>/jobs/<id>.jsonl`: what was ordered, what is complete, how it ended.
//!
//! Invariants: a job is what its records say, folded by [`History::apply`], in a running agent as well as after a
//! restart; a record counts when it is durable (`base::journal`). A journal whose first record never became durable
//! was never acknowledged to anybody and is removed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::base::durable::{create_dir_all_durable, remove_file_durable};
use crate::base::journal::Journal;
use crate::error::{Context, Error, Kind, Result};
use crate::job::records::{EndRecord, ErrorRecord, FORMAT, Record};
use crate::model::id::JobId;
use crate::model::job::{JobReport, JobState, StepReport, StepState};

const SUFFIX: &str = "jsonl";

/// Where the jobs of an agent lie.
pub fn directory_in(state_dir: &Path) -> PathBuf {
    state_dir.join("jobs")
}

/// What the records of a job add up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    pub report: JobReport,
    /// What steps left for later ones.
    pub facts: BTreeMap<String, String>,
    /// Somebody accepted the held job.
    pub accepted: bool,
    /// Somebody asked for the job to be undone.
    pub cancel_asked: bool,
}

impl History {
    /// The history of a job of which only the order is known.
    pub fn begin(record: &Record) -> Result<History> {
        let Record::Ordered { format, at, order, steps } = record else {
            return Err(Error::new(Kind::Damaged, "the first record is not an order"));
        };
        if *format != FORMAT {
            return Err(Error::new(Kind::Unsupported, format!("the journal has format {format}, known is {FORMAT}"))
                .hint("was it written by a newer keiki?"));
        }
        let steps = steps.iter().map(|step| StepReport {
            name: step.name.clone(),
            state: StepState::Waiting,
            done: 0,
            total: 0,
            unit: step.unit.into(),
            note: String::new(),
            began_at: None,
            ended_at: None,
        });
        let report = JobReport {
            order: order.to_order()?,
            state: JobState::Running,
            began_at: at.0,
            ended_at: None,
            steps: steps.collect(),
            results: Vec::new(),
            checks: Vec::new(),
            error: None,
        };
        Ok(History { report, facts: BTreeMap::new(), accepted: false, cancel_asked: false })
    }

    /// Takes one more record into account.
    pub fn apply(&mut self, record: &Record) -> Result<()> {
        match record {
            Record::Ordered { .. } => return Err(Error::new(Kind::Damaged, "a second order in one journal")),
            Record::StepBegun { at, step } => {
                let step = self.step(step)?;
                (step.state, step.began_at, step.ended_at) = (StepState::Running, Some(at.0), None);
                (step.done, step.total) = (0, 0);
                step.note.clear();
            }
            Record::Fact { key, value } => {
                self.facts.insert(key.clone(), value.clone());
            }
            Record::StepDone { at, step, done, total, note, said } => {
                let step = self.step(step)?;
                (step.state, step.ended_at) = (StepState::Done, Some(at.0));
                (step.done, step.total, step.note) = (*done, *total, note.clone());
                self.say(said);
            }
            Record::StepFailed { at, step, note, said, error } => {
                let step = self.step(step)?;
                (step.state, step.ended_at, step.note) = (StepState::Failed, Some(at.0), note.clone());
                self.report.error = Some(error.to_error());
                self.say(said);
            }
            Record::Held { .. } => self.report.state = JobState::Held,
            Record::CancelAsked { .. } => {
                self.cancel_asked = true;
                (self.report.state, self.report.ended_at) = (JobState::Running, None);
            }
            Record::Resumed { from_step, accepted, .. } => self.resume(from_step, *accepted)?,
            Record::Ended { at, state, error } => {
                self.report.state = match state {
                    EndRecord::Done => JobState::Done,
                    EndRecord::Failed => JobState::Failed,
                    EndRecord::Cancelled => JobState::Cancelled,
                };
                self.report.ended_at = Some(at.0);
                self.report.error = error.as_ref().map(ErrorRecord::to_error);
                // A cancellation that did not succeed may be asked for again, or the job resumed.
                self.cancel_asked = false;
            }
        }
        Ok(())
    }

    fn resume(&mut self, from_step: &str, accepted: bool) -> Result<()> {
        let from = self.index_of(from_step)?;
        for step in &mut self.report.steps[from..] {
            *step = StepReport {
                name: std::mem::take(&mut step.name),
                state: StepState::Waiting,
                done: 0,
                total: 0,
                unit: step.unit,
                note: String::new(),
                began_at: None,
                ended_at: None,
            };
        }
        self.accepted |= accepted;
        self.report.state = JobState::Running;
        (self.report.ended_at, self.report.error) = (None, None);
        Ok(())
    }

    fn say(&mut self, said: &super::records::SaidRecord) {
        self.report.results = said.results.clone();
        self.report.checks = said.checks.iter().cloned().map(Into::into).collect();
    }

    fn index_of(&self, name: &str) -> Result<usize> {
        let found = self.report.steps.iter().position(|step| step.name == name);
        found.ok_or_else(|| Error::new(Kind::Damaged, format!("the plan has no step '{name}'")))
    }

    fn step(&mut self, name: &str) -> Result<&mut StepReport> {
        let index = self.index_of(name)?;
        Ok(&mut self.report.steps[index])
    }

    /// Whether nothing more will happen to the job by itself, and nothing of it waits for anybody.
    pub fn is_over(&self) -> bool {
        !matches!(self.report.state, JobState::Running | JobState::Held)
    }
}

/// The journal of one job that is not over.
pub struct JobLog {
    journal: Journal,
}

impl JobLog {
    /// Begins the journal of a new job with its first record. Blocking.
    pub fn create(directory: &Path, id: JobId, first: &Record) -> Result<JobLog> {
        create_dir_all_durable(directory, 0o700)?;
        let path = path_of(directory, id);
        let (journal, lines) = Journal::open(&path)?;
        if !lines.is_empty() {
            return Err(Error::new(Kind::Conflict, format!("journal '{}' exists already", path.display())));
        }
        let mut log = JobLog { journal };
        log.append(first)?;
        Ok(log)
    }

    /// Opens the journal of a job to go on with it. Blocking.
    pub fn reopen(directory: &Path, id: JobId) -> Result<JobLog> {
        Ok(JobLog { journal: Journal::open(&path_of(directory, id))?.0 })
    }

    /// Adds a record; it is durable when this returns. Blocking.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record)
            .map_err(|error| Error::new(Kind::Internal, format!("cannot write a record of a job: {error}")))?;
        self.journal.append(line.as_bytes())
    }
}

fn path_of(directory: &Path, id: JobId) -> PathBuf {
    directory.join(format!("{id}.{SUFFIX}"))
}

/// Removes the journal of a job for good. Blocking.
pub fn forget(directory: &Path, id: JobId) -> Result<()> {
    remove_file_durable(&path_of(directory, id))
}

/// All jobs of a directory, and one error for each journal that cannot be understood. Blocking.
pub fn load_all(directory: &Path) -> Result<(Vec<History>, Vec<Error>)> {
    create_dir_all_durable(directory, 0o700)?;
    let what = || format!("cannot read directory '{}'", directory.display());
    let (mut histories, mut errors) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(directory).context(what)? {
        let path = entry.context(what)?.path();
        let id = path.file_stem().and_then(|stem| JobId::parse(&stem.to_string_lossy()).ok());
        let (Some(id), true) = (id, path.extension().is_some_and(|suffix| suffix == SUFFIX)) else {
            continue;
        };
        match load(&path) {
            Ok(Some(history)) if history.report.order.id == id => histories.push(history),
            Ok(Some(_)) => errors.push(Error::new(
                Kind::Damaged,
                format!("cannot use journal '{}': it belongs to another job", path.display()),
            )),
            Ok(None) => remove_file_durable(&path)?,
            Err(error) => errors.push(error.while_doing(format!("cannot use journal '{}'", path.display()))),
        }
    }
    Ok((histories, errors))
}

fn load(path: &Path) -> Result<Option<History>> {
    let mut history: Option<History> = None;
    for line in Journal::read_all(path)? {
        let record: Record = serde_json::from_slice(&line)
            .map_err(|error| Error::new(Kind::Damaged, format!("a record cannot be understood: {error}")))?;
        match &mut history {
            None => history = Some(History::begin(&record)?),
            Some(history) => history.apply(&record)?,
        }
    }
    Ok(history)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::records::{Instant, OrderRecord, SaidRecord, StepRecord, UnitRecord};
    use crate::model::backup::BackupKind;
    use crate::model::job::{Order, Task};

    fn at(second: i64) -> Instant {
        Instant(jiff::Timestamp::from_second(second).unwrap())
    }

    fn ordered(id: JobId) -> Record {
        let task = Task::Backup { instance: "orders".into(), kind: BackupKind::Manual };
        let step = |name: &str| StepRecord { name: name.into(), unit: UnitRecord::Items };
        Record::Ordered {
            format: FORMAT,
            at: at(1),
            order: OrderRecord::from(&Order { id, by: "local:root".into(), task }),
            steps: vec![step("check"), step("copy")],
        }
    }

    fn story() -> Vec<Record> {
        let said = SaidRecord { results: vec![("backup".into(), "x".into())], checks: vec![] };
        let error = ErrorRecord { kind: "full".into(), message: "disk full".into(), hint: None };
        vec![
            Record::StepBegun { at: at(2), step: "check".into() },
            Record::Fact { key: "backup".into(), value: "x".into() },
            Record::StepDone { at: at(3), step: "check".into(), done: 1, total: 1, note: "fine".into(), said },
            Record::StepBegun { at: at(4), step: "copy".into() },
            Record::StepFailed {
                at: at(5),
                step: "copy".into(),
                note: String::new(),
                said: SaidRecord::default(),
                error: error.clone(),
            },
            Record::Ended { at: at(6), state: EndRecord::Failed, error: Some(error) },
        ]
    }

    #[test]
    fn a_journal_cut_after_any_record_reads_back_as_the_job_stood_then() {
        let directory = tempfile::tempdir().unwrap();
        let id = JobId::fresh();
        let first = ordered(id);
        let mut log = JobLog::create(directory.path(), id, &first).unwrap();
        let mut history = History::begin(&first).unwrap();
        for record in story() {
            assert_eq!(load_all(directory.path()).unwrap().0, [history.clone()]);
            log.append(&record).unwrap();
            history.apply(&record).unwrap();
        }
        assert_eq!(history.report.state, JobState::Failed);
        assert_eq!(history.facts["backup"], "x");
        assert_eq!(history.report.steps[0].state, StepState::Done);
        assert!(history.is_over());
        history.apply(&Record::Resumed { at: at(7), from_step: "copy".into(), accepted: false }).unwrap();
        assert_eq!((history.report.state, history.report.error.clone()), (JobState::Running, None));
        assert_eq!(history.report.steps[0].state, StepState::Done);
        assert_eq!(history.report.steps[1].state, StepState::Waiting);
    }

    #[test]
    fn a_journal_that_was_never_acknowledged_goes_and_a_damaged_one_is_named_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let (empty, damaged, good) = (JobId::fresh(), JobId::fresh(), JobId::fresh());
        std::fs::write(path_of(directory.path(), empty), "0123").unwrap();
        std::fs::write(path_of(directory.path(), damaged), "00000000 {}\n11111111 {}\n").unwrap();
        JobLog::create(directory.path(), good, &ordered(good)).unwrap();
        let (histories, errors) = load_all(directory.path()).unwrap();
        assert_eq!(histories.iter().map(|history| history.report.order.id).collect::<Vec<_>>(), [good]);
        assert_eq!(errors.len(), 1);
        assert!(errors[0].message().contains(&damaged.to_string()), "{}", errors[0]);
        assert!(!path_of(directory.path(), empty).exists() && path_of(directory.path(), damaged).exists());
    }
}
