//! The daemon: configuration, one supervisor per instance, and what answers requests.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::base::bulk::run_blocking;
use crate::base::clock::SystemClock;
use crate::base::durable;
use crate::error::{Context, Error, Kind, Result};
use crate::job::{JobRunner, RunnerOptions};
use crate::peer::server::{self, LocalUsers, Server, ServerOptions};
use crate::peer::tls::{Identity, TlsIdentity};

pub mod config;
mod doctor;
mod host;
mod launcher;
mod objects;
mod peers;
mod registry;
mod repository;
mod schedule;
mod service;
mod slots;
mod sources;
mod supervisor;
mod views;
mod workshop;

use config::Config;
use host::Host;
use peers::Peers;
use service::AgentService;
use workshop::AgentWorkshop;

/// How long running requests may take to end when the agent is told to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// Jobs that are over and still shown.
const JOBS_KEPT: usize = 200;
/// More clones wait for their turn: disk and network are shared.
const CLONES_AT_ONCE: usize = 2;

/// Runs the agent until SIGTERM or SIGINT. Jobs that are running then go on at the next start.
pub fn run(config: Config, config_path: &Path) -> Result<()> {
    start_logging();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context(|| "cannot start the asynchronous runtime")?;
    let result = runtime.block_on(serve(config, config_path));
    // Threads that hang in the file system must not keep the agent from ending.
    runtime.shutdown_timeout(DRAIN);
    result
}

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KEIKI_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // Colours are for terminals: a file or the journal would show them as signs. A second subscriber in one process
    // (tests) is refused; the first stays.
    let _ = lines.with_ansi(std::io::stderr().is_terminal()).try_init();
}

async fn serve(config: Config, config_path: &Path) -> Result<()> {
    let clock = Arc::new(SystemClock);
    let state_dir = config.host.state_dir.clone();
    // Clones' default place may lie below it, so others can pass through; what is secret has modes of its own.
    durable::create_dir_all_durable(&state_dir, 0o711)?;
    // Two agents on one state directory would drive the same jobs.
    let _lock = durable::lock_file(&state_dir.join("agent.lock")).map_err(|error| {
        error.hint("another agent is running with this state directory; 'systemctl status keiki' shows it")
    })?;
    let identity = config.tls.clone().map(TlsIdentity::load).transpose()?;
    if let Some(identity) = &identity {
        require_own_certificate(&config.host.name, &identity.facts().identity, config_path)?;
    }
    let peers = Arc::new(Peers::new(&config, identity.as_ref(), clock.clone()));
    let host = Host::new(config, clock.clone(), peers)?;
    let workshop = AgentWorkshop::new(&host);
    let options = RunnerOptions { keep_jobs: JOBS_KEPT, heavy_at_once: CLONES_AT_ONCE };
    let runner = Arc::new(JobRunner::open(&state_dir, workshop.clone(), clock.clone(), options)?);
    host.set_runner(runner.clone());

    let service = Arc::new(AgentService { host: host.clone(), workshop });
    let options =
        ServerOptions { connections_max: host.config.limits.connections, drain: DRAIN, ..ServerOptions::default() };
    let server = Server::new(service, clock, options);
    let control = server::bind_unix(&host.config.host.control_socket).await?;
    let mut servers = JoinSet::new();
    servers.spawn(server.clone().serve_unix(control, LocalUsers::default(), host.stop.clone()));
    if let (Some(address), Some(identity)) = (host.config.listen, &identity) {
        let listener = server::bind_tcp(address).await?;
        servers.spawn(server.serve_tls(listener, identity.clone(), host.stop.clone()));
    }
    launcher::launch_after_boot(&workshop::clone_engine, &state_dir, &host.holder.boot_id).await?;
    host.start_instances()?;
    runner.recover_interrupted().await;
    let schedule = tokio::spawn(schedule::run(host.clone()));
    tracing::info!("agent of host '{}' {} is ready", host.config.host.name, env!("CARGO_PKG_VERSION"));
    // Not being started by systemd is no failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    wait_for_the_end(&host, identity.as_ref(), config_path).await?;
    tracing::info!("agent of host '{}' is stopping", host.config.host.name);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    runner.shut_down().await;
    host.stop.cancel();
    host.stop_instances().await;
    host.repository.save_local_copy(true).await;
    while servers.join_next().await.is_some() {}
    // It ends by itself when the host stops; how does not matter any more.
    let _ = schedule.await;
    Ok(())
}

/// Another host's certificate would make every peer refuse this one, and every refusal look like a fault of theirs.
fn require_own_certificate(host: &str, identity: &Identity, config_path: &Path) -> Result<()> {
    if *identity == Identity::Host(host.to_string()) {
        return Ok(());
    }
    let what = format!("cannot be host '{host}': the certificate in [tls] is for '{}'", identity.uri());
    let hint =
        format!("is 'name' in [host] of '{}' right? 'keiki ca issue --host {host}' makes one", config_path.display());
    Err(Error::new(Kind::BadInput, what).hint(hint))
}

/// Waits for SIGTERM or SIGINT; SIGHUP reads the certificates and the configuration again.
async fn wait_for_the_end(host: &Arc<Host>, identity: Option<&Arc<TlsIdentity>>, config_path: &Path) -> Result<()> {
    let what = || "cannot listen to signals";
    let mut terminate = signal(SignalKind::terminate()).context(what)?;
    let mut interrupt = signal(SignalKind::interrupt()).context(what)?;
    let mut hang_up = signal(SignalKind::hangup()).context(what)?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hang_up.recv() => {
                if let Some(identity) = identity {
                    match identity.reload() {
                        Ok(()) => tracing::info!("certificates are reloaded"),
                        Err(error) => tracing::error!("the old certificates stay: {error}"),
                    }
                }
                match reload(host, config_path).await {
                    Ok(()) => tracing::info!("'{}' is read again", config_path.display()),
                    Err(error) => tracing::error!("the old configuration stays: {error}"),
                }
            }
        }
    }
}

/// Takes the instances of the configuration file as it is now. The rest of it counts from the next start on.
async fn reload(host: &Arc<Host>, config_path: &Path) -> Result<()> {
    let path = config_path.to_path_buf();
    let config = run_blocking("read the configuration", move || Config::load(&path)).await?;
    host.reload_instances(&config.instances).await?;
    if (Config { instances: host.config.instances.clone(), ..config }) != host.config {
        tracing::warn!("changes in '{}' beside [[instance]] count after a restart only", config_path.display());
    }
    Ok(())
}
