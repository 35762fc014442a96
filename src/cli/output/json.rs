//! The JSON that `--json` prints. Field names are a contract: scripts read them.

use serde_json::{Value, json};

use crate::error::Error;
use crate::model::backup::{Backup, BackupKind};
use crate::model::check::{CheckItem, Verdict};
use crate::model::cost::{CostLine, Prices, RequestKind, Usage, monthly};
use crate::model::group::Group;
use crate::model::id::IncarnationId;
use crate::model::inventory::Total;
use crate::model::job::{JobReport, JobState, ProgressUnit, StepReport, StepState, Task};
use crate::model::window::Window;
use crate::peer::api::{HostStatus, InstanceState, InstanceStatus, RepositoryCost, RepositoryFacts};

pub fn error(error: &Error) -> Value {
    json!({ "error": error.kind().name(), "message": error.message(), "hint": error.hint_text() })
}

pub fn checks(items: &[CheckItem]) -> Value {
    let item_value = |item: &CheckItem| json!({ "what": item.what, "verdict": verdict_name(item.verdict), "found": item.found, "hint": item.hint });
    Value::Array(items.iter().map(item_value).collect())
}

fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    }
}

pub fn job(report: &JobReport) -> Value {
    let task = match &report.order.task {
        Task::Backup { instance, kind } => {
            json!({ "kind": "backup", "instance": instance, "backup_kind": backup_kind_name(*kind) })
        }
        Task::Clone(order) => json!({
            "kind": "clone", "source": order.source, "name": order.clone_name, "target": order.target.to_string(),
            "data_dir": order.data_dir, "port": order.port, "settings": order.settings, "hold": order.hold,
            "passwords_for": order.passwords_for, "keep_expired": order.keep_expired,
        }),
        Task::CloneGroup(order) => json!({
            "kind": "clone-group", "group": order.group, "name": order.clone_name, "sources": order.sources,
            "members": order.member_names(), "target": order.target.to_string(), "hold": order.hold,
        }),
    };
    json!({
        "id": report.order.id.to_string(),
        "by": report.order.by,
        "task": task,
        "state": job_state_name(report.state),
        "began_at": report.began_at.to_string(),
        "ended_at": report.ended_at.map(|at| at.to_string()),
        "steps": report.steps.iter().map(step).collect::<Vec<_>>(),
        "results": report.results.iter().map(|(name, value)| json!({ "name": name, "value": value })).collect::<Vec<_>>(),
        "checks": checks(&report.checks),
        "error": report.error.as_ref().map(error),
    })
}

fn step(step: &StepReport) -> Value {
    json!({
        "name": step.name,
        "state": match step.state {
            StepState::Waiting => "waiting",
            StepState::Running => "running",
            StepState::Done => "done",
            StepState::Failed => "failed",
        },
        "done": step.done,
        "total": step.total,
        "unit": match step.unit { ProgressUnit::Bytes => "bytes", ProgressUnit::Items => "items" },
        "note": step.note,
        "began_at": step.began_at.map(|at| at.to_string()),
        "ended_at": step.ended_at.map(|at| at.to_string()),
    })
}

pub fn job_state_name(state: JobState) -> &'static str {
    match state {
        JobState::Running => "running",
        JobState::Held => "held",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

pub fn backup_kind_name(kind: BackupKind) -> &'static str {
    match kind {
        BackupKind::Automatic => "automatic",
        BackupKind::Manual => "manual",
    }
}

pub fn backup(backup: &Backup) -> Value {
    json!({
        "id": backup.id.to_string(),
        "incarnation": backup.incarnation.to_string(),
        "kind": backup_kind_name(backup.kind),
        "start": backup.start.to_string(),
        "stop": backup.stop.to_string(),
        "began_at": backup.began_at.to_string(),
        "ended_at": backup.ended_at.to_string(),
        "engine_version": backup.engine_version,
        "file_count": backup.file_count,
        "restored_bytes": backup.restored_bytes,
        "stored_bytes": backup.stored_bytes,
    })
}

pub fn window(incarnation: IncarnationId, window: &Window) -> Value {
    json!({
        "incarnation": incarnation.to_string(),
        "reaches": window.reaches.iter().map(|reach| json!({
            "backup": reach.backup.to_string(),
            "from": reach.from.to_string(),
            "from_time": reach.from_time.to_string(),
            "to": reach.to.to_string(),
            "last_commit_at": reach.last_commit_at.map(|at| at.to_string()),
            "covered_until": reach.covered_until.map(|at| at.to_string()),
        })).collect::<Vec<_>>(),
        "holes": window.holes.iter().map(|hole| json!({
            "from": hole.from.to_string(),
            "to": hole.to.to_string(),
            "from_time": hole.from_time.map(|at| at.to_string()),
            "to_time": hole.to_time.map(|at| at.to_string()),
        })).collect::<Vec<_>>(),
    })
}

pub fn host_status(status: &HostStatus) -> Value {
    json!({
        "host": status.host,
        "version": status.version,
        "began_at": status.began_at.to_string(),
        "now": status.now.to_string(),
        "repository": status.repository,
        "repository_error": status.repository_error.as_ref().map(error),
        "instances": status.instances.iter().map(instance).collect::<Vec<_>>(),
        "groups": groups(&status.groups),
        "peers": status.peers.iter().map(|peer| json!({ "name": peer.name, "address": peer.address })).collect::<Vec<_>>(),
    })
}

pub fn groups(groups: &[Group]) -> Value {
    Value::Array(groups.iter().map(|group| json!({ "name": group.name, "members": group.members })).collect())
}

pub fn repository(facts: &RepositoryFacts) -> Value {
    let total = |total: Total| json!({ "objects": total.objects, "bytes": total.bytes });
    let incarnations = facts.inventory.incarnations.iter().map(|(incarnation, holdings)| {
        json!({
            "incarnation": incarnation.id.to_string(),
            "host": incarnation.host,
            "instance": incarnation.instance,
            "engine": incarnation.engine.name(),
            "engine_version": incarnation.engine_version,
            "began_at": incarnation.began_at.to_string(),
            "parent": incarnation.parent.as_ref().map(|(id, at)| json!({ "incarnation": id.to_string(), "departed_at": at.to_string() })),
            "backups": holdings.manifests.objects,
            "log": total(holdings.log),
            "packs": total(holdings.packs),
            "manifests": total(holdings.manifests),
            "rest": total(holdings.rest),
        })
    });
    let capabilities: serde_json::Map<String, Value> =
        facts.capabilities.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    json!({
        "repository": facts.url,
        "id": facts.id.to_string(),
        "format_version": facts.format_version,
        "created_at": facts.created_at.to_string(),
        "capabilities": capabilities,
        "incarnations": incarnations.collect::<Vec<_>>(),
        "rest": total(facts.inventory.rest),
    })
}

pub fn repository_cost(cost: &RepositoryCost) -> Value {
    let usage = |usage: &Usage| {
        let requests: serde_json::Map<String, Value> =
            RequestKind::ALL.iter().map(|kind| (kind.name().to_string(), json!(usage.requests(*kind)))).collect();
        json!({ "requests": requests, "received_bytes": usage.received_bytes, "sent_bytes": usage.sent_bytes })
    };
    let lines = monthly(&cost.reading, cost.stored_bytes, cost.prices.as_ref().unwrap_or(&Prices::default()));
    let line = |line: &CostLine| json!({ "what": line.what, "monthly": line.monthly, "amount": line.amount.map(|amount| amount as f64 / 1e9) });
    json!({
        "repository": cost.repository,
        "since": cost.reading.since.to_string(),
        "last_hour_seconds": cost.reading.last_hour_seconds,
        "last_hour": usage(&cost.reading.last_hour),
        "total": usage(&cost.reading.total),
        "stored_bytes": cost.stored_bytes,
        "month": lines.iter().map(line).collect::<Vec<_>>(),
        "currency": cost.prices.as_ref().map(|prices| &prices.currency),
    })
}

pub fn instance(instance: &InstanceStatus) -> Value {
    json!({
        "name": instance.name,
        "engine": instance.engine,
        "engine_version": instance.engine_version,
        "data_dir": instance.data_dir,
        "port": instance.port,
        "state": instance_state_name(instance.state),
        "incarnation": instance.incarnation.map(|id| id.to_string()),
        "shipped": instance.shipped.map(|position| position.to_string()),
        "durable": instance.durable.map(|position| position.to_string()),
        "durable_at": instance.durable_at.map(|at| at.to_string()),
        "backlog_bytes": instance.backlog_bytes,
        "backlog_seconds": instance.backlog_seconds,
        "last_backup": instance.last_backup.as_ref().map(|(id, at)| json!({ "id": id, "at": at.to_string() })),
        "problem": instance.problem.as_ref().map(error),
    })
}

pub fn instance_state_name(state: InstanceState) -> &'static str {
    match state {
        InstanceState::Starting => "starting",
        InstanceState::Archiving => "archiving",
        InstanceState::Retrying => "retrying",
        InstanceState::Stopped => "stopped",
        InstanceState::Quarantine => "quarantine",
        InstanceState::Down => "down",
    }
}
