//! `keiki ca`: the authority that makes certificates for hosts and operators. It needs no agent: its key belongs on a
//! machine that people trust, not on a database host.

use std::path::Path;

use jiff::Timestamp;

use crate::cli::Outcome;
use crate::cli::arguments::CaAction;
use crate::cli::output::table;
use crate::error::Result;
use crate::model::target::utc_text;
use crate::peer::ca::{Authority, IssuedEntry};
use crate::peer::tls::Identity;

pub fn run(action: CaAction, as_json: bool) -> Result<Outcome> {
    match action {
        CaAction::Init { dir } => init(&dir, as_json)?,
        CaAction::Issue { dir, host, operator, days } => {
            // clap demands exactly one of the two.
            let identity = match (host, operator) {
                (Some(host), _) => Identity::Host(host),
                (None, operator) => Identity::Operator(operator.unwrap_or_default()),
            };
            issue(&dir, &identity, days, as_json)?;
        }
        CaAction::List { dir } => list(&dir, as_json)?,
    }
    Ok(Outcome::Good)
}

fn init(dir: &Path, as_json: bool) -> Result<()> {
    let authority = Authority::init(dir, Timestamp::now())?;
    let certificate = authority.certificate_path();
    if as_json {
        println!("{}", serde_json::json!({ "ca": certificate.display().to_string() }));
    } else {
        println!("certificate authority  {}", certificate.display());
        println!("next: keiki ca issue {} --host NAME", dir.display());
    }
    Ok(())
}

fn issue(dir: &Path, identity: &Identity, days: u32, as_json: bool) -> Result<()> {
    let issued = Authority::open(dir)?.issue(identity, Timestamp::now(), days)?;
    if as_json {
        let mut value = entry_json(&issued.entry);
        value["ca"] = issued.ca.display().to_string().into();
        value["certificate"] = issued.certificate.display().to_string().into();
        value["key"] = issued.key.display().to_string().into();
        println!("{value}");
    } else {
        println!("{}, valid until {}", issued.entry.identity, utc_text(issued.entry.not_after));
        println!("  ca           {}", issued.ca.display());
        println!("  certificate  {}", issued.certificate.display());
        println!("  key          {}", issued.key.display());
    }
    Ok(())
}

fn list(dir: &Path, as_json: bool) -> Result<()> {
    let entries = Authority::open(dir)?.list()?;
    if as_json {
        println!("{}", serde_json::Value::Array(entries.iter().map(entry_json).collect()));
        return Ok(());
    }
    let row = |entry: &IssuedEntry| {
        vec![entry.identity.to_string(), utc_text(entry.issued_at), utc_text(entry.not_after), entry.serial.clone()]
    };
    table::print(&["WHO", "ISSUED", "VALID UNTIL", "SERIAL"], entries.iter().map(row).collect());
    Ok(())
}

fn entry_json(entry: &IssuedEntry) -> serde_json::Value {
    serde_json::json!({
        "identity": entry.identity.uri(),
        "issued_at": entry.issued_at.to_string(),
        "not_after": entry.not_after.to_string(),
        "serial": entry.serial,
    })
}
