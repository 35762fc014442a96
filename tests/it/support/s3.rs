//! S3 servers for tests: a real one (SeaweedFS, as a process of its own on loopback), and s3s-fs in this process, on
//! request as one that ignores every condition.
//!
//! A server that a test needs and cannot find is a failure with the command that installs it.

// Not every test uses all of it.
#![allow(dead_code)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use keiki::base::clock::SystemClock;
use keiki::store::s3::{CredentialsSource, S3Options, S3Store};

use super::hosts::free_port;

/// The bucket that every server of a test has.
pub const BUCKET: &str = "keiki";

/// A SeaweedFS with everything in one directory. It ends with this value, or with this process, and leaves nothing.
pub struct Weed {
    ports: Vec<u16>,
    dir: PathBuf,
    tls: Option<(PathBuf, PathBuf)>,
    /// The shell that ends the server and cleans up when its standard input is closed, which it is when this process
    /// ends, however that comes about.
    keeper: Option<Child>,
}

const KEEPER: &str = "trap '' TERM INT HUP; \"$@\" >>\"$LOG\" 2>&1 & server=$!; read -r order; kill -9 $server; \
                      wait $server 2>/dev/null; [ \"$order\" = keep ] || rm -rf \"$DIR\"";

impl Weed {
    /// The server that all tests of this process share; each uses a prefix of its own.
    pub fn shared() -> &'static Weed {
        static SHARED: OnceLock<Weed> = OnceLock::new();
        SHARED.get_or_init(Weed::start)
    }

    /// A server of its own.
    pub fn start() -> Weed {
        Weed::start_with(None)
    }

    /// The same, speaking TLS on a second port with this certificate and key.
    pub fn start_with(tls: Option<(PathBuf, PathBuf)>) -> Weed {
        let dir = tempfile::Builder::new().prefix("keiki-weed-").tempdir_in("/tmp").unwrap().keep();
        fs::create_dir(dir.join("data")).unwrap();
        let identity = |name: &str, access: &str, secret: &str, actions: &str| {
            format!(
                "{{\"name\":\"{name}\",\"credentials\":[{{\"accessKey\":\"{access}\",\"secretKey\":\"{secret}\"}}],\
                 \"actions\":[{actions}]}}"
            )
        };
        let identities = format!(
            "{{\"identities\":[{},{}]}}",
            identity("admin", "AKTEST", "SKTESTSKTEST", "\"Admin\",\"Read\",\"Write\",\"List\",\"Tagging\""),
            identity("reader", "AKREAD", "SKREADSKREAD", &format!("\"Read:{BUCKET}\",\"List:{BUCKET}\"")),
        );
        fs::write(dir.join("s3.json"), identities).unwrap();
        write_private(
            &dir.join("keys"),
            "[default]\naws_access_key_id = AKTEST\naws_secret_access_key = SKTESTSKTEST\n\
             [reader]\naws_access_key_id = AKREAD\naws_secret_access_key = SKREADSKREAD\n\
             [unknown]\naws_access_key_id = AKNOBODY\naws_secret_access_key = SKTESTSKTEST\n\
             [wrong]\naws_access_key_id = AKTEST\naws_secret_access_key = SKWRONG\n",
        );
        let mut weed = Weed { ports: Vec::new(), dir, tls, keeper: None };
        // A port may be taken between the look for a free one and its use.
        for _ in 0..5 {
            weed.ports = (0..11).map(|_| free_port()).collect();
            if weed.try_start() {
                return weed;
            }
            weed.stop();
        }
        panic!("SeaweedFS does not start: {}", weed.log());
    }

    fn try_start(&mut self) -> bool {
        let program = std::env::var("KEIKI_TEST_WEED")
            .expect("KEIKI_TEST_WEED is not set: run 'make install-test-servers', then 'make test'");
        let names = [
            "s3.port",
            "s3.port.grpc",
            "master.port",
            "master.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "admin.port",
            "admin.port.grpc",
        ];
        let mut command = Command::new("sh");
        // Its own logs would stay in /tmp.
        let logs = format!("-logdir={}", self.dir.display());
        command.args(["-c", KEEPER, "sh", &program, &logs, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
        command.arg(format!("-dir={}", self.dir.join("data").display()));
        command.arg(format!("-s3.config={}", self.dir.join("s3.json").display()));
        command.args(names.iter().zip(&self.ports).map(|(name, port)| format!("-{name}={port}")));
        command.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"]);
        command.args([&format!("-bucket={BUCKET}"), "-s3.autoCreateBucket=false"]);
        if let Some((certificate, key)) = &self.tls {
            command.arg(format!("-s3.port.https={}", self.ports[10]));
            command.arg(format!("-s3.cert.file={}", certificate.display()));
            command.arg(format!("-s3.key.file={}", key.display()));
        } else {
            command.arg("-s3.port.https=0");
        }
        command.env("LOG", self.dir.join("log")).env("DIR", &self.dir).current_dir(&self.dir);
        self.keeper = Some(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(30) {
            // The bucket is made when everything else runs, and a server that was asked too early remembers the answer.
            let filer = format!("/buckets/{BUCKET}/?limit=1");
            if answers(self.ports[0], "/", "403") && answers(self.ports[4], &filer, "200") {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Kills the server; what it holds stays.
    pub fn stop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.stdin.take().unwrap().write_all(b"keep\n");
            keeper.wait().unwrap();
        }
    }

    /// Starts it again on the same ports, with what it held.
    pub fn start_again(&mut self) {
        assert!(self.keeper.is_none() && self.try_start(), "SeaweedFS does not start again: {}", self.log());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn port(&self) -> u16 {
        self.ports[0]
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    pub fn https_endpoint(&self) -> String {
        format!("https://127.0.0.1:{}", self.ports[10])
    }

    /// A file with the sections `default`, `reader` (may not write), `unknown` and `wrong`.
    pub fn credentials_file(&self) -> PathBuf {
        self.dir.join("keys")
    }

    /// The lines of the section `[repository]` for this server, below a prefix.
    pub fn repository_lines(&self, prefix: &str) -> String {
        self.repository_lines_at(&self.endpoint(), prefix)
    }

    /// The same by way of another endpoint, which leads here.
    pub fn repository_lines_at(&self, endpoint: &str, prefix: &str) -> String {
        let keys = self.credentials_file();
        format!(
            "url = \"s3://{BUCKET}/{prefix}\"\nendpoint = \"{endpoint}\"\ncredentials_file = \"{}\"",
            keys.display()
        )
    }

    /// How to reach the bucket, below a prefix.
    pub fn options(&self, prefix: &str) -> S3Options {
        S3Options {
            endpoint: Some(self.endpoint()),
            path_style: true,
            credentials: CredentialsSource { file: Some(self.credentials_file()), profile: None },
            ..S3Options::new(BUCKET, prefix)
        }
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            drop(keeper.stdin.take());
            let _ = keeper.wait();
        } else {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Whether a server answers with this status.
fn answers(port: u16, path: &str, status: &str) -> bool {
    use std::io::Read;
    let Ok(mut socket) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return false };
    let _ = socket.set_read_timeout(Some(Duration::from_secs(2)));
    let request = format!("GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n");
    let mut start = [0; 12];
    let wanted = format!("HTTP/1.1 {status}");
    socket.write_all(request.as_bytes()).is_ok()
        && socket.read_exact(&mut start).is_ok()
        && start.as_slice() == wanted.as_bytes()
}

pub fn write_private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// A store under options, without knowledge of what its server can do.
pub async fn open(options: S3Options) -> Arc<S3Store> {
    Arc::new(S3Store::open(options, Arc::new(SystemClock)).await.unwrap())
}

/// The server for the contract and the story: SeaweedFS, or the one that the environment names by
/// `KEIKI_TEST_S3_ENDPOINT`, `_BUCKET`, `_CREDENTIALS` (a file) and, if it is not the usual one, `_REGION`.
pub mod named {
    use super::*;

    fn variable(name: &str) -> String {
        let name = format!("KEIKI_TEST_S3_{name}");
        std::env::var(&name).unwrap_or_else(|_| panic!("{name} is not set: it names the server that is to be tried"))
    }

    fn region() -> String {
        std::env::var("KEIKI_TEST_S3_REGION").unwrap_or_else(|_| String::from("us-east-1"))
    }

    /// Whether it is another than SeaweedFS.
    pub fn is_named() -> bool {
        std::env::var_os("KEIKI_TEST_S3_ENDPOINT").is_some()
    }

    /// How to reach its bucket, below a prefix.
    pub fn options(prefix: &str) -> S3Options {
        if !is_named() {
            return Weed::shared().options(prefix);
        }
        S3Options {
            endpoint: Some(variable("ENDPOINT")),
            region: region(),
            path_style: true,
            credentials: CredentialsSource { file: Some(variable("CREDENTIALS").into()), profile: None },
            ..S3Options::new(&variable("BUCKET"), prefix)
        }
    }

    /// The lines of the section `[repository]` for it.
    pub fn repository_lines(prefix: &str) -> String {
        if !is_named() {
            return Weed::shared().repository_lines(prefix);
        }
        format!(
            "url = \"s3://{}/{prefix}\"\nendpoint = \"{}\"\nregion = \"{}\"\ncredentials_file = \"{}\"",
            variable("BUCKET"),
            variable("ENDPOINT"),
            region(),
            variable("CREDENTIALS")
        )
    }
}

/// The files of a certificate for 127.0.0.1 that is its own authority, and of its key, in a directory.
pub fn self_signed(dir: &Path) -> (PathBuf, PathBuf) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_string()]).unwrap().self_signed(&key).unwrap();
    let places = (dir.join("server.pem"), dir.join("server.key"));
    fs::write(&places.0, certificate.pem()).unwrap();
    write_private(&places.1, &key.serialize_pem());
    places
}

/// A prefix that no other test uses.
pub fn fresh_prefix() -> String {
    format!("test-{:016x}", keiki::base::random::random_u64())
}

pub mod in_process {
    //! s3s-fs behind a listener on loopback, in this process.

    use hyper_util::rt::TokioIo;
    use s3s::auth::SimpleAuth;
    use s3s::dto::*;
    use s3s::service::S3ServiceBuilder;
    use s3s::{S3, S3Request, S3Response, S3Result};
    use s3s_fs::FileSystem;

    use super::*;

    /// Whether the server takes conditions for what they are.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Conditions {
        Honoured,
        /// Read and forgotten, as by some servers: everybody's write succeeds.
        Ignored,
    }

    /// A server over an empty bucket below `dir`; it runs until the runtime ends.
    pub async fn start(dir: &Path, conditions: Conditions) -> S3Options {
        fs::create_dir_all(dir.join("root").join(BUCKET)).unwrap();
        write_private(&dir.join("keys"), "aws_access_key_id = AKTEST\naws_secret_access_key = SKTESTSKTEST\n");
        let inner = FileSystem::new(dir.join("root")).unwrap();
        let mut builder = S3ServiceBuilder::new(Careless { inner, conditions });
        builder.set_auth(SimpleAuth::from_single("AKTEST", "SKTESTSKTEST"));
        let service = builder.build();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let connection =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service);
                    let _ = connection.await;
                });
            }
        });
        S3Options {
            endpoint: Some(format!("http://{address}")),
            path_style: true,
            credentials: CredentialsSource { file: Some(dir.join("keys")), profile: None },
            ..S3Options::new(BUCKET, "in/process")
        }
    }

    /// What the configuration says about such a server that ignores conditions.
    pub async fn repository_lines(dir: &Path) -> String {
        let options = start(dir, Conditions::Ignored).await;
        format!(
            "url = \"s3://{BUCKET}/in/process\"\nendpoint = \"{}\"\ncredentials_file = \"{}\"",
            options.endpoint.unwrap(),
            dir.join("keys").display()
        )
    }

    struct Careless {
        inner: FileSystem,
        conditions: Conditions,
    }

    macro_rules! hand_on {
        ($($name:ident($input:ident) -> $output:ident),* $(,)?) => {
            #[async_trait::async_trait]
            impl S3 for Careless {
                $(async fn $name(&self, request: S3Request<$input>) -> S3Result<S3Response<$output>> {
                    self.inner.$name(request).await
                })*

                async fn put_object(
                    &self,
                    mut request: S3Request<PutObjectInput>,
                ) -> S3Result<S3Response<PutObjectOutput>> {
                    if self.conditions == Conditions::Ignored {
                        request.input.if_none_match = None;
                        request.input.if_match = None;
                    }
                    self.inner.put_object(request).await
                }

                async fn complete_multipart_upload(
                    &self,
                    mut request: S3Request<CompleteMultipartUploadInput>,
                ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
                    if self.conditions == Conditions::Ignored {
                        request.input.if_none_match = None;
                        request.input.if_match = None;
                    }
                    self.inner.complete_multipart_upload(request).await
                }
            }
        };
    }

    hand_on! {
        get_object(GetObjectInput) -> GetObjectOutput,
        head_object(HeadObjectInput) -> HeadObjectOutput,
        delete_object(DeleteObjectInput) -> DeleteObjectOutput,
        delete_objects(DeleteObjectsInput) -> DeleteObjectsOutput,
        list_objects_v2(ListObjectsV2Input) -> ListObjectsV2Output,
        create_multipart_upload(CreateMultipartUploadInput) -> CreateMultipartUploadOutput,
        upload_part(UploadPartInput) -> UploadPartOutput,
        abort_multipart_upload(AbortMultipartUploadInput) -> AbortMultipartUploadOutput,
    }
}
