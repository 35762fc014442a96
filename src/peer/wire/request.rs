//! Twins of requests. New variants go to the end and raise the protocol version.

use serde::{Deserialize, Serialize};

use super::Twin;
use super::noun::WireOrder;
use crate::error::{Error, Kind, Result};
use crate::model::password::Password;
use crate::peer::api::{PutWhen, Request};

/// A request may be forwarded once, so that nobody can send a request in a request in a request.
#[derive(Serialize, Deserialize)]
pub enum WireRequest {
    Direct(DirectRequest),
    Forward { host: String, request: DirectRequest },
}

#[derive(Serialize, Deserialize)]
pub enum DirectRequest {
    Hello,
    Status,
    Doctor,
    Submit { order: WireOrder, passwords: Vec<(String, String)> },
    Check { order: WireOrder },
    ListJobs,
    ShowJob { id: String },
    CancelJob { id: String },
    ResumeJob { id: String },
    Accept { clone: String },
    Discard { clone: String },
    ListBackups { instance: String },
    ShowWindow { instance: String },
    ShipNow { incarnation: String },
    InitRepository,
    PushLog { data_dir: String, file: String },
    GetObject { key: String, range: Option<(u64, u64)> },
    HeadObject { key: String },
    ListObjects { prefix: String, after: Option<String>, limit: u32 },
    PutObject { key: String, condition: WirePutWhen },
    DeleteObjects { keys: Vec<String> },
    ShowRepository,
    ShowCost,
    LinkObjects { keys: Vec<String>, valid_for_seconds: u64 },
}

#[derive(Serialize, Deserialize)]
pub enum WirePutWhen {
    Create,
    Replace,
    IfMatch(String),
}

impl Twin for PutWhen {
    type Wire = WirePutWhen;

    fn to_wire(&self) -> WirePutWhen {
        match self {
            PutWhen::Create => WirePutWhen::Create,
            PutWhen::Replace => WirePutWhen::Replace,
            PutWhen::IfMatch(tag) => WirePutWhen::IfMatch(tag.clone()),
        }
    }

    fn from_wire(wire: WirePutWhen) -> Result<PutWhen> {
        Ok(match wire {
            WirePutWhen::Create => PutWhen::Create,
            WirePutWhen::Replace => PutWhen::Replace,
            WirePutWhen::IfMatch(tag) => PutWhen::IfMatch(tag),
        })
    }
}

/// The twin of a request; a forwarded request to forward a request has none.
pub fn to_wire(request: &Request) -> Result<WireRequest> {
    match request {
        Request::Forward { host, request } => {
            Ok(WireRequest::Forward { host: host.clone(), request: direct_to_wire(request)? })
        }
        request => Ok(WireRequest::Direct(direct_to_wire(request)?)),
    }
}

pub fn from_wire(wire: WireRequest) -> Result<Request> {
    match wire {
        WireRequest::Direct(request) => direct_from_wire(request),
        WireRequest::Forward { host, request } => {
            Ok(Request::Forward { host, request: Box::new(direct_from_wire(request)?) })
        }
    }
}

fn direct_to_wire(request: &Request) -> Result<DirectRequest> {
    Ok(match request.clone() {
        Request::Hello => DirectRequest::Hello,
        Request::Status => DirectRequest::Status,
        Request::Doctor => DirectRequest::Doctor,
        Request::Submit { order, passwords } => DirectRequest::Submit {
            order: order.to_wire(),
            passwords: passwords.iter().map(|(account, text)| (account.clone(), text.expose().to_string())).collect(),
        },
        Request::Check { order } => DirectRequest::Check { order: order.to_wire() },
        Request::ListJobs => DirectRequest::ListJobs,
        Request::ShowJob { id } => DirectRequest::ShowJob { id: id.to_wire() },
        Request::CancelJob { id } => DirectRequest::CancelJob { id: id.to_wire() },
        Request::ResumeJob { id } => DirectRequest::ResumeJob { id: id.to_wire() },
        Request::Accept { clone } => DirectRequest::Accept { clone },
        Request::Discard { clone } => DirectRequest::Discard { clone },
        Request::ListBackups { instance } => DirectRequest::ListBackups { instance },
        Request::ShowWindow { instance } => DirectRequest::ShowWindow { instance },
        Request::ShipNow { incarnation } => DirectRequest::ShipNow { incarnation: incarnation.to_wire() },
        Request::InitRepository => DirectRequest::InitRepository,
        Request::ShowRepository => DirectRequest::ShowRepository,
        Request::ShowCost => DirectRequest::ShowCost,
        Request::PushLog { data_dir, file } => DirectRequest::PushLog { data_dir, file },
        Request::GetObject { key, range } => {
            DirectRequest::GetObject { key, range: range.map(|range| (range.start, range.end)) }
        }
        Request::HeadObject { key } => DirectRequest::HeadObject { key },
        Request::ListObjects { prefix, after, limit } => DirectRequest::ListObjects { prefix, after, limit },
        Request::PutObject { key, condition } => DirectRequest::PutObject { key, condition: condition.to_wire() },
        Request::DeleteObjects { keys } => DirectRequest::DeleteObjects { keys },
        Request::LinkObjects { keys, valid_for_seconds } => DirectRequest::LinkObjects { keys, valid_for_seconds },
        Request::Forward { host, .. } => {
            return Err(Error::new(
                Kind::BadInput,
                format!("cannot forward to host '{host}' what is forwarded already"),
            ));
        }
    })
}

fn direct_from_wire(wire: DirectRequest) -> Result<Request> {
    Ok(match wire {
        DirectRequest::Hello => Request::Hello,
        DirectRequest::Status => Request::Status,
        DirectRequest::Doctor => Request::Doctor,
        DirectRequest::Submit { order, passwords } => {
            let passwords = passwords.into_iter().map(|(account, text)| Ok((account, Password::new(text)?)));
            Request::Submit { order: Twin::from_wire(order)?, passwords: passwords.collect::<Result<_>>()? }
        }
        DirectRequest::Check { order } => Request::Check { order: Twin::from_wire(order)? },
        DirectRequest::ListJobs => Request::ListJobs,
        DirectRequest::ShowJob { id } => Request::ShowJob { id: Twin::from_wire(id)? },
        DirectRequest::CancelJob { id } => Request::CancelJob { id: Twin::from_wire(id)? },
        DirectRequest::ResumeJob { id } => Request::ResumeJob { id: Twin::from_wire(id)? },
        DirectRequest::Accept { clone } => Request::Accept { clone },
        DirectRequest::Discard { clone } => Request::Discard { clone },
        DirectRequest::ListBackups { instance } => Request::ListBackups { instance },
        DirectRequest::ShowWindow { instance } => Request::ShowWindow { instance },
        DirectRequest::ShipNow { incarnation } => Request::ShipNow { incarnation: Twin::from_wire(incarnation)? },
        DirectRequest::InitRepository => Request::InitRepository,
        DirectRequest::ShowRepository => Request::ShowRepository,
        DirectRequest::ShowCost => Request::ShowCost,
        DirectRequest::PushLog { data_dir, file } => Request::PushLog { data_dir, file },
        DirectRequest::GetObject { key, range } => Request::GetObject { key, range: range.map(|(from, to)| from..to) },
        DirectRequest::HeadObject { key } => Request::HeadObject { key },
        DirectRequest::ListObjects { prefix, after, limit } => Request::ListObjects { prefix, after, limit },
        DirectRequest::PutObject { key, condition } => {
            Request::PutObject { key, condition: Twin::from_wire(condition)? }
        }
        DirectRequest::DeleteObjects { keys } => Request::DeleteObjects { keys },
        DirectRequest::LinkObjects { keys, valid_for_seconds } => Request::LinkObjects { keys, valid_for_seconds },
    })
}
