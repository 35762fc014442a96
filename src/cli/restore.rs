//! `keiki restore --from-links`: a backup as plain files, by a file of links and nothing else.

use std::sync::Arc;

use crate::base::clock::SystemClock;
use crate::base::retry::RetryPolicy;
use crate::cli::Outcome;
use crate::cli::arguments::RestoreArguments;
use crate::cli::download::{output_at, say, write};
use crate::error::Result;
use crate::repo::repository::Repository;
use crate::store::links::LinksStore;
use crate::store::peer::PeerStore;

pub async fn run(arguments: RestoreArguments, as_json: bool) -> Result<Outcome> {
    let RestoreArguments { from_links, ca_file, place } = arguments;
    let links = Arc::new(LinksStore::open(&from_links, ca_file.as_deref(), Arc::new(SystemClock))?);
    let header = links.header().clone();
    let failed = |error: crate::error::Error| error.while_doing(format!("cannot restore backup '{}'", header.backup));
    let (output, is_stdout) = output_at(&place, header.backup_ended_at)?;
    let store = Arc::new(PeerStore::over(links, Arc::new(SystemClock), RetryPolicy::brief()));
    let repository = Repository::open(store).await.map_err(failed)?;
    let done = write(&repository, header.incarnation, &header.backup, output).await.map_err(failed)?;
    say(&header.backup, &done, is_stdout, as_json);
    Ok(Outcome::Good)
}
