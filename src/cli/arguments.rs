//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Grows clones of database servers: to any moment, from one host to another.
#[derive(Parser)]
#[command(name = "keiki", version, about, disable_help_subcommand = true, max_term_width = 110)]
pub struct Arguments {
    #[command(flatten)]
    pub connect: Connect,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

/// How to find the agent.
#[derive(Args)]
pub struct Connect {
    /// The configuration file.
    #[arg(long, global = true, value_name = "FILE", env = "KEIKI_CONFIG", default_value = "/etc/keiki/keiki.toml")]
    pub config: PathBuf,
    /// The agent's control socket; found in the configuration if not given.
    #[arg(long, global = true, value_name = "PATH", env = "KEIKI_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Ask the agent of this host instead, through the agent of this one.
    #[arg(long, global = true, value_name = "HOST")]
    pub on: Option<String>,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Run the agent of this host.
    Agent,
    /// Check configuration, permissions, servers, repository and peers.
    Doctor,
    /// Show what runs on this host: archiving, backlog, last backup, problems.
    Status,
    /// List the instances of this host and of its peers.
    Instances,
    /// List this host and its peers.
    Hosts,
    /// Take and list base backups.
    Backup {
        #[command(subcommand)]
        action: BackupAction,
    },
    /// Write a backup as plain files by links alone: without an agent, a configuration or credentials.
    Restore(RestoreArguments),
    /// Show the moments that a clone can be made of.
    Window { instance: String },
    /// Grow a clone of an instance as it was at a moment.
    Clone(CloneArguments),
    /// Open a clone, or a group of clones, that waits in quarantine.
    Accept { name: String },
    /// Delete a clone, or a group of clones, that waits in quarantine or was accepted.
    Discard {
        name: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// List, follow and steer jobs.
    Job {
        #[command(subcommand)]
        action: JobAction,
    },
    /// Prepare the place where everything is kept, see what it holds and what it costs.
    Repository {
        #[command(subcommand)]
        action: RepositoryAction,
    },
    /// Make the certificates with which agents know each other.
    Ca {
        #[command(subcommand)]
        action: CaAction,
    },
    /// Called by PostgreSQL as its archive_command: succeeds when the segment is safe in the repository.
    #[command(name = "wal-push")]
    WalPush {
        /// What PostgreSQL puts in place of %p.
        path: PathBuf,
    },
}

#[derive(Subcommand)]
pub enum BackupAction {
    /// Take a base backup now.
    Create {
        instance: String,
        /// Do not wait for the end.
        #[arg(long)]
        detach: bool,
    },
    /// List the backups of an instance, oldest first.
    List { instance: String },
    /// Show all that is known of one backup.
    Show { instance: String, backup: String },
    /// Write a backup as plain files, with the log that makes it consistent; or links with which others can.
    Download(DownloadArguments),
}

#[derive(Args)]
pub struct DownloadArguments {
    pub instance: String,
    pub backup: String,
    /// A directory that does not exist yet; with --link the file for the links.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["tar", "link"], conflicts_with = "tar")]
    pub to: Option<PathBuf>,
    /// A tar archive; '-' is the standard output.
    #[arg(long, value_name = "FILE", conflicts_with = "link")]
    pub tar: Option<PathBuf>,
    /// Links that work without credentials for so long, as in 1h; at most 7d. For 'keiki restore --from-links'.
    #[arg(long, value_name = "DURATION")]
    pub link: Option<String>,
}

#[derive(Args)]
pub struct RestoreArguments {
    /// What 'keiki backup download --link' wrote.
    #[arg(long, value_name = "FILE", required = true)]
    pub from_links: PathBuf,
    /// Certificates to trust beside those that this host trusts, as a file in PEM form.
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    #[command(flatten)]
    pub place: Place,
}

/// Where the files of a backup go.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct Place {
    /// A directory that does not exist yet.
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
    /// A tar archive; '-' is the standard output.
    #[arg(long, value_name = "FILE")]
    pub tar: Option<PathBuf>,
}

#[derive(Args)]
pub struct CloneArguments {
    /// The instance to clone: NAME, or HOST/NAME where several hosts have one of that name. Or a group of this host.
    pub source: String,
    /// The host, or the hosts, that the clone grows on; this host if not given.
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    pub to: Vec<String>,
    /// The name of the clone; those of a group get it before the names of their instances.
    #[arg(long = "as", value_name = "NAME")]
    pub clone_name: String,
    #[command(flatten)]
    pub target: TargetArguments,
    /// The data directory; below '[clone] data_root' of the target host if not given.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<String>,
    /// The port; the first free one of '[clone] ports' of the target host if not given.
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// A server setting that the clone gets, as in --set work_mem=64MB; may be repeated.
    #[arg(long = "set", value_name = "PARAMETER=VALUE")]
    pub settings: Vec<String>,
    /// A new password for an account of the clone, out of the first line of a file; may be repeated.
    #[arg(long = "password", value_name = "USER=FILE")]
    pub passwords: Vec<String>,
    /// Redis and Valkey: keep the keys that have expired since that moment, without a time to live.
    #[arg(long)]
    pub keep_expired: bool,
    /// Print the check list and do nothing.
    #[arg(long)]
    pub check: bool,
    /// Leave the clone in quarantine until 'keiki accept' or 'keiki discard'.
    #[arg(long)]
    pub hold: bool,
    /// Do not wait for the end.
    #[arg(long)]
    pub detach: bool,
}

#[derive(Args)]
#[group(multiple = false)]
pub struct TargetArguments {
    /// A time with its offset, as in '2026-11-21 09:59:00+00'.
    #[arg(long, value_name = "TIME")]
    pub at: Option<String>,
    /// Exactly this backup set, at its first consistent moment.
    #[arg(long, value_name = "BACKUP")]
    pub backup: Option<String>,
    /// A log position, as in 16/B374D848, or of MariaDB a log file and an offset, as in binlog.000012:4567.
    #[arg(long, value_name = "POSITION")]
    pub position: Option<String>,
    /// Up to this transaction of MariaDB and with it, as in 0-5-2257.
    #[arg(long, value_name = "GTID")]
    pub gtid: Option<String>,
    /// Up to this transaction of MariaDB and without it.
    #[arg(long, value_name = "GTID")]
    pub before_gtid: Option<String>,
    /// A restore point that was named on the source.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// All that is committed now; this is the default.
    #[arg(long)]
    pub latest: bool,
}

#[derive(Subcommand)]
pub enum JobAction {
    /// List jobs, newest first.
    List,
    /// Show one job with its steps.
    Show { id: String },
    /// Watch a job until it ends.
    Follow { id: String },
    /// Stop a job; a clone that it was growing is deleted.
    Cancel { id: String },
    /// Go on with a job that failed or was interrupted.
    Resume { id: String },
}

#[derive(Subcommand)]
pub enum RepositoryAction {
    /// Make the configured place a repository.
    Init,
    /// Show what it is and what it holds, by instance. Lists all of it.
    Show,
    /// Show what this agent asks of it, hour by hour, and what that costs with the prices of the configuration.
    Cost,
}

#[derive(Subcommand)]
pub enum CaAction {
    /// Make a certificate authority in a directory.
    Init { dir: PathBuf },
    /// Issue the certificate of a host or of an operator.
    Issue {
        dir: PathBuf,
        /// The host that the certificate is for.
        #[arg(long, value_name = "NAME", required_unless_present = "operator", conflicts_with = "operator")]
        host: Option<String>,
        /// The person that the certificate is for.
        #[arg(long, value_name = "NAME")]
        operator: Option<String>,
        /// How long it is valid.
        #[arg(long, default_value_t = 825)]
        days: u32,
    },
    /// List what was issued.
    List { dir: PathBuf },
}

/// What `keiki` without arguments prints: what one can do, in groups.
pub fn print_overview() {
    anstream::println!("{OVERVIEW}");
}

const OVERVIEW: &str = "\
keiki grows clones of database servers: to any moment, from one host to another

see what there is
  keiki status                     archiving, backlog, last backup, problems
  keiki instances | hosts          what runs where
  keiki window INSTANCE            the moments that can be reached
  keiki doctor                     check everything, with hints

back up
  keiki backup create INSTANCE     take a base backup now
  keiki backup list INSTANCE
  keiki backup download INSTANCE BACKUP --to DIR
                                   a backup as plain files; --tar FILE makes an archive
  keiki backup download INSTANCE BACKUP --link 1h
                                   links with which a host without credentials can read it
  keiki restore --from-links FILE --to DIR

clone
  keiki clone SOURCE --to HOST --as NAME --at '2026-11-21 09:59:00+00'
                                   add --check to see the check list only, --hold to look before it opens
                                   SOURCE may be a group: its members grow as NAME-member, as one
  keiki accept NAME | discard NAME decide about a clone, or a group of them, in quarantine
  keiki job list | follow ID       watch what is running

set up
  keiki ca init DIR                a certificate authority for your hosts
  keiki ca issue DIR --host NAME   a certificate for one of them
  keiki repository init            prepare the place where everything is kept
  keiki repository show | cost     what it holds, and what a month of it costs
  keiki agent                      run the agent of this host

'keiki VERB --help' says more; --json prints JSON; --on HOST asks the agent of another host";
