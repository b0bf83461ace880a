//! The home: the directory with `keys.db` and `root.key`. Finds it, makes it, opens the engine on it.
//!
//! A new root key beside an existing store would lock its owner out without a word, so it is never made.

use std::{
    env,
    fs::{self, DirBuilder, File},
    io,
    path::{Path, PathBuf},
};

use keymill::{
    Alias, CreateKey, DueEventKind, DueWork, Engine, EngineBuilder, ErrorKind, RootKey,
    check_store_path,
};

use crate::{
    failure::{Failure, Result, Status, say},
    identity::{Named, Place},
    print, standard,
};

/// A home that may or may not exist.
pub(crate) struct Home {
    dir: PathBuf,
}

impl Home {
    /// The directory asked for, or that of `KEYMILL_HOME`, or `keymill` in the XDG data directory.
    pub(crate) fn resolve(asked: Option<PathBuf>) -> Result<Self> {
        // A variable that is empty counts as unset, as in a shell.
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        if let Some(dir) = asked.or_else(|| set("KEYMILL_HOME").map(PathBuf::from)) {
            return Ok(Self { dir });
        }
        // The XDG specification: a relative path is to be ignored.
        let data = set("XDG_DATA_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".local/share")))
            .ok_or_else(|| {
                Failure::refused(
                    "no place for the key store: neither XDG_DATA_HOME nor HOME is set",
                    "name a directory with --home DIR or KEYMILL_HOME",
                )
            })?;
        Ok(Self { dir: data.join("keymill") })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.join("keys.db")
    }

    pub(crate) fn root_key(&self) -> PathBuf {
        self.dir.join("root.key")
    }

    /// Refuses to write where a file of this home is: with it every key would be lost.
    pub(crate) fn spare(&self, output: &Named) -> Result<()> {
        self.excludes(output, "which would be destroyed")
    }

    /// The same of the file that `option` names.
    #[cfg(feature = "server")]
    pub(crate) fn spare_as(&self, option: &str, path: &Path) -> Result<()> {
        self.spare(&Named::file(option, path))
    }

    /// The same of standard output and standard error, which a shell may have led anywhere.
    pub(crate) fn spare_from_streams(&self) -> Result<()> {
        let files = self.files();
        if files.iter().any(|file| file.is(Named::standard_error().place())) {
            // The message itself would do it.
            standard::mute();
            return self.spare(&Named::standard_error());
        }
        self.spare(&Named::standard_output())
    }

    /// Refuses a file of this home where another is wanted; `why` is the end of a sentence.
    pub(crate) fn excludes(&self, file: &Named, why: &str) -> Result<()> {
        if self.files().iter().any(|own| own.is(file.place())) {
            return Err(Failure::refused(
                format!("{} is part of the key store, {why}", file.called()),
                "name another file",
            ));
        }
        Ok(())
    }

    /// The files of this home, and those that SQLite keeps beside its own, whether or not they are there.
    fn files(&self) -> Vec<Place> {
        let store = self.store();
        // SQLite keeps them beside the file itself, and not beside a link to it.
        let behind_link = fs::canonicalize(&store).unwrap_or_else(|_| store.clone());
        let mut files = vec![Place::of(&self.root_key())];
        for database in [store, behind_link] {
            for more in ["", "-wal", "-shm", "-journal"] {
                let mut path = database.clone().into_os_string();
                path.push(more);
                files.push(Place::of(Path::new(&path)));
            }
        }
        files
    }

    /// Opens the engine on a home that exists.
    pub(crate) fn open(&self) -> Result<Engine> {
        let engine = self.open_with(Engine::builder())?;
        for event in engine.take_due_events() {
            if let DueEventKind::Rotated { .. } = event.kind {
                let since = event.due.map(print::time).unwrap_or_default();
                say(format_args!("rotated {} (due since {since})", event.key_id));
            }
        }
        Ok(engine)
    }

    /// Opens an engine that leaves due work to its caller: opening carries it out otherwise, and a later report has
    /// nothing to tell.
    pub(crate) fn open_before_due_work(&self) -> Result<Engine> {
        self.open_with(Engine::builder().due_work(DueWork::OnRequest))
    }

    /// Opens the engine with these settings.
    pub(crate) fn open_with(&self, builder: EngineBuilder) -> Result<Engine> {
        self.check_exists()?;
        Ok(builder.open(self.store(), &self.read_root_key()?)?)
    }

    /// Refuses a home that is not there, or not whole.
    pub(crate) fn check_exists(&self) -> Result<()> {
        let store = self.store();
        self.check_length()?;
        if !exists(&store)? {
            return Err(Failure::broke(
                format!("there is no key store at {store:?}"),
                "`keymill init` makes one, and so does `keymill generate --key alias/app \
                 --create`; --home DIR or KEYMILL_HOME choose another place",
            ));
        }
        if !exists(&self.root_key())? {
            return Err(self.root_key_missing());
        }
        Ok(())
    }

    fn check_length(&self) -> Result<()> {
        check_store_path(self.store()).map_err(|error| {
            let hint = "choose a shorter place by --home DIR or KEYMILL_HOME";
            Failure::new(Status::of(&error), error.to_string(), hint)
        })
    }

    /// Makes an empty home.
    pub(crate) fn init(&self) -> Result<()> {
        let _making = self.lock()?;
        let hints = [
            "use it as it is, or choose another place with --home DIR",
            "restore its keys.db from a backup, or choose another place with --home DIR; `keymill \
             generate --key alias/app --create` makes a new keys.db under this root.key",
        ];
        for (path, hint) in [self.store(), self.root_key()].into_iter().zip(hints) {
            if exists(&path)? {
                return Err(Failure::refused(format!("{path:?} exists already"), hint));
            }
        }
        self.make().map(drop)
    }

    /// Opens the engine, after making what is missing: home, store, and the key that `name`, an alias, names.
    pub(crate) fn open_or_create(&self, name: &str) -> Result<Engine> {
        if let Err(error) = Alias::parse(name) {
            return Err(Failure::refused(
                format!("--create makes keys under an alias: {error}"),
                "name the key alias/NAME, or leave --create out",
            ));
        }
        let _making = self.lock()?;
        let engine = if exists(&self.store())? { self.open()? } else { self.make()? };
        match engine.describe_key(name) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::KeyNotFound => {
                let key = engine.create_key(&CreateKey {
                    alias: Some(name.to_owned()),
                    ..Default::default()
                })?;
                say(format_args!("made key {} for {name}", key.key_id));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(engine)
    }

    /// Makes root key and store. A root key that is there already is used: without a store it guards nothing yet.
    fn make(&self) -> Result<Engine> {
        let path = self.root_key();
        let made = !exists(&path)?;
        let root_key = if made { RootKey::create_file(&path)? } else { RootKey::from_file(&path)? };
        let engine = Engine::create(self.store(), &root_key).inspect_err(|_| {
            // So that a second attempt starts afresh. Never beside a store, which could be under this key.
            if made && matches!(exists(&self.store()), Ok(false)) {
                let _ = fs::remove_file(&path);
            }
        })?;
        say(format_args!(
            "made a key store in {:?}; whoever has its root.key can open it, and nobody else can",
            self.dir
        ));
        Ok(engine)
    }

    /// Makes the directory if needed and locks it, so that of two commands that start at once on a fresh machine one
    /// makes the home and the other finds it complete. Unlocks when dropped.
    fn lock(&self) -> Result<File> {
        // Before anything is made.
        self.check_length()?;
        let fail = |error: io::Error| Failure::file("cannot use directory", &self.dir, &error);
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&self.dir).map_err(fail)?;
        let dir = File::open(&self.dir).map_err(fail)?;
        match dir.lock() {
            Err(error) if error.kind() != io::ErrorKind::Unsupported => Err(fail(error)),
            // A file system without locks: creating the files is exclusive all the same.
            _ => Ok(dir),
        }
    }

    /// A root key that cannot be used is a fault of the home, not of the request.
    pub(crate) fn read_root_key(&self) -> Result<RootKey> {
        RootKey::from_file(self.root_key()).map_err(|error| {
            Failure::broke(
                error.to_string(),
                "root.key is 32 raw bytes of the user that runs keymill, mode 0600, or of root and \
                 readable by a group; correct that, or restore it from its backup",
            )
        })
    }

    fn root_key_missing(&self) -> Failure {
        Failure::broke(
            format!("{:?} is missing, and {:?} opens with no other", self.root_key(), self.store()),
            "restore root.key from its backup; without it the keys of this store are lost",
        )
    }
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|error| Failure::file("cannot look for", path, &error))
}
