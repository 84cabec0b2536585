package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/workspaced/workspaced/store/seal"
)

const (
	// lockTimeout is how long Open waits for another process to let go of the
	// file.
	lockTimeout = time.Second
	// mapSize is how much of the file is mapped from the start, and growSize by
	// how much the file grows at once. A file that grows beyond its mapping is
	// mapped anew: that waits for all readers, and if it fails, as it does when a
	// failing disk makes the file system go read-only, nothing can be read any more.
	mapSize  = 1 << 30
	growSize = 1 << 20
	// closeTimeout is how long Close waits for a disk that does not answer.
	closeTimeout = 10 * time.Second
)

// Config is what a Store needs.
type Config struct {
	// Path is the database file. It is made when there is none; its directory has
	// to be there.
	Path string
	// KEK wraps the database's data keys, which seal the secrets.
	KEK seal.KEK
	// FormerKEK is what has wrapped them so far, where KEK is a new one: Open wraps
	// them anew. It may be nil.
	FormerKEK seal.KEK
	// SecretVersions is how many versions of a secret are kept, the current one
	// among them, up to MaxSecretVersions; 0: DefaultSecretVersions. With a lower
	// number than before, what is above it goes with the key's next new version.
	SecretVersions int
	// OnCommit is called with every commit's changes, on the writer's goroutine,
	// after the commit and before its callers get their answers. It must not block
	// and must not call the store. It may be nil. Changes that a failing disk left
	// in doubt are told as well.
	OnCommit func([]Change)
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Logger is told what no caller learns of, like a slow disk; nil: nobody is.
	Logger *slog.Logger
	// Around does each of Steps, and what a compaction does; nil: it is simply done. Tests make steps fail by
	// it. Its context ends when the store is closed, which cuts no real commit
	// short: nothing can.
	Around func(ctx context.Context, step string, do func(context.Context) error) error

	// Audit bounds the audit log.
	Audit AuditPolicy
	// Quotas bound what all workspaces take together.
	Quotas Quotas

	rollouts rolloutPolicy    // for tests
	upkeep   <-chan time.Time // for tests: when the next part of the upkeep is due
}

// stepCommit makes a transaction durable: its pages are written and synced, then
// the page that makes them count.
const stepCommit = "store.commit"

// The steps of a compaction, see compact.go.
const (
	stepCopy     = "store.copy"      // a part of the rows into the new file, durable
	stepRename   = "store.rename"    // the new file takes the old one's name
	stepSyncName = "store.sync_name" // which is durable then
)

// Steps are the names of the steps of Config.Around that a change takes.
var Steps = []string{stepCommit}

// upkeepSteps are those that only follow a rotation. They are not in Steps: whoever
// makes changes fail by these, as a simulation does that never rotates, would wait
// for them in vain. This package's tests make each of them fail.
var upkeepSteps = []string{stepCopy, stepRename, stepSyncName}

// Store is an open database. Its methods may be called by many goroutines at
// once.
type Store struct {
	cfg      Config
	db       *bolt.DB
	file     *os.File // db's
	pageSize int
	instance string
	sealer   *seal.Sealer
	hindered atomic.Pointer[error] // what has kept the upkeep from going on
	revision atomic.Uint64         // of the last commit

	commits  atomic.Uint64 // how many have begun and how many have ended, together
	watchdog watchdog
	limits   limits
	audit    auditor
	sharing  sharing

	// The writer's.
	inDoubt  bool // the last commit is
	totals   Quotas
	renamed  bool // the file has just got its name, which may not be durable
	rolling  rolling
	upkeep   upkeep
	replaced replaced

	ops       chan *op
	pings     chan struct{}
	closing   <-chan struct{} // of life
	life      context.Context // ends when Close is called
	endLife   context.CancelFunc
	closeOnce sync.Once
	closeErr  error
	writer    sync.WaitGroup
}

// Open opens the database, or makes it. It changes nothing and returns an
// *OpenError when another process has it open (ErrLocked), it is damaged
// (ErrDamaged), it was sealed with another key (ErrWrongKey), its key can't be had
// now (ErrKEK), or a newer version of this program wrote it (ErrSchema). An older
// schema is migrated.
func Open(cfg Config) (*Store, error) { return open(cfg, migrations) }

func open(cfg Config, steps []migration) (*Store, error) {
	if cfg.KEK == nil {
		return nil, errors.New("store: Config.KEK is missing")
	}
	if cfg.upkeep == nil {
		cfg.upkeep = atOnce
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Around == nil {
		cfg.Around = func(ctx context.Context, _ string, do func(context.Context) error) error { return do(ctx) }
	}
	if cfg.Audit.MaxBytes == 0 {
		cfg.Audit.MaxBytes = DefaultAuditBytes
	}
	if cfg.SecretVersions == 0 {
		cfg.SecretVersions = DefaultSecretVersions
	}
	if cfg.SecretVersions < 1 || cfg.SecretVersions > MaxSecretVersions {
		return nil, fmt.Errorf("store: Config.SecretVersions is %d, not from 1 to %d", cfg.SecretVersions, MaxSecretVersions)
	}
	if cfg.rollouts == (rolloutPolicy{}) {
		cfg.rollouts = defaultRollouts
	}
	ctx, cancel := context.WithTimeout(context.Background(), kekTimeout)
	defer cancel()
	info, err := os.Stat(cfg.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := create(ctx, cfg); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, createError(&cfg, err)
		}
	case err != nil:
		return nil, fmt.Errorf("database can't be opened: %w", err)
	case !info.Mode().IsRegular():
		return nil, &OpenError{cfg.Path, ErrDamaged, "is not a regular file"}
	case info.Size() == 0:
		// create never leaves such a file, and bbolt would take it for a new one.
		return nil, &OpenError{cfg.Path, ErrDamaged, "is empty: restore it from a backup, or remove the file to begin anew"}
	}

	// Everything is looked at, through a read-only mapping, before anything is
	// written, so that a database that is refused stays as it is, byte for byte.
	if err := checkOpenFile(&cfg); err != nil {
		return nil, readError(cfg.Path, err)
	}
	db, file, err := openFile(cfg.Path, true)
	if err != nil {
		return nil, err
	}
	var keys openedKeys
	err = guard(func() error {
		var kept storedKeys
		err := db.View(func(tx *bolt.Tx) (err error) {
			kept, err = identify(tx, cfg, len(steps)+1)
			return err
		})
		if err == nil {
			keys, err = openKeys(ctx, &cfg, kept)
		}
		if err != nil {
			return err
		}
		return db.View(func(tx *bolt.Tx) error { return verify(tx, cfg, keys.sealer, len(steps)+1) })
	})
	closeFile(db, file)
	if err != nil {
		return nil, openError(cfg.Path, err)
	}

	db, file, err = openFile(cfg.Path, false)
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg: cfg, sealer: keys.sealer, db: db, file: file, pageSize: db.Info().PageSize, watchdog: watchdog{log: cfg.Logger},
		ops: make(chan *op), pings: make(chan struct{}),
	}
	s.life, s.endLife = context.WithCancel(context.Background())
	s.closing = s.life.Done()
	s.audit.init()
	err = guard(func() error { return s.load(ctx, keys, steps) })
	if err != nil {
		s.endLife()
		closeFile(db, file)
		return nil, openError(cfg.Path, err)
	}
	s.removeLeftover()
	s.writer.Go(s.write)
	return s, nil
}

// load migrates and reads what the store keeps in memory.
func (s *Store) load(ctx context.Context, keys openedKeys, steps []migration) error {
	var version uint64
	err := s.db.View(func(tx *bolt.Tx) (err error) {
		s.instance = string(tx.Bucket(bucketMeta).Get(metaInstance))
		version, err = schemaOf(tx)
		return err
	})
	var wrapped *storedWrapped
	if err == nil {
		wrapped, err = keys.carryOver(ctx, &s.cfg)
	}
	if err == nil && (version != uint64(len(steps)+1) || wrapped != nil) {
		err = s.db.Update(func(tx *bolt.Tx) error {
			if wrapped != nil {
				if err := putKeys(tx, *wrapped); err != nil {
					return err
				}
			}
			if err := migrate(tx, s.sealer, steps); errors.Is(err, ErrDamaged) {
				return damagedError(s.cfg.Path, err) // nobody has looked at the old rows yet
			} else if err != nil {
				return err
			}
			if err := checkRows(tx, s.sealer, inTurn(tx)); err != nil {
				return damagedError(s.cfg.Path, err)
			}
			return nil
		})
	}
	if err == nil {
		err = s.loadAuditKey()
	}
	if err != nil {
		return err
	}
	return s.db.View(func(tx *bolt.Tx) error {
		s.committed(tx.ID())
		revision, err := counter(tx, counterRevision)
		if err != nil {
			return err
		}
		s.revision.Store(revision)
		st := &auditState{}
		if found, err := getRecord(tx, bucketCounters, counterAudit, st); found && err == nil && st.genuine(s.audit.key, s.instance) {
			s.audit.copied.Store(st.Copied)
		}
		if s.cfg.Quotas != (Quotas{}) {
			totals, err := countTotals(tx)
			if err != nil {
				return err
			}
			s.totals = totals
		}
		rollouts, err := rolloutsOf(tx)
		if len(rollouts) > 0 {
			s.rolling.ready = s.cfg.rollouts.next
		}
		if err == nil {
			err = s.beginUpkeep(tx)
		}
		return err
	})
}

// create makes the database under another name first: whatever has the real
// name is complete.
func create(ctx context.Context, cfg Config) (err error) {
	instance := uuid.NewString()
	sealer, keys, err := seal.Create(ctx, cfg.KEK, instance)
	if err != nil {
		return err
	}
	dir := filepath.Dir(cfg.Path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(cfg.Path)+".*") // mode 0600
	if err != nil {
		return err
	}
	tmp := f.Name()
	defer func() { err = errors.Join(err, os.Remove(tmp)) }()
	if err := f.Close(); err != nil {
		return err
	}
	db, err := bolt.Open(tmp, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error { return initialize(tx, instance, sealer, storedWrapped{Wrapped: keys}) })
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp, cfg.Path); err != nil {
		return err
	}
	return syncDir(dir)
}

// openFile opens the file with bbolt.
func openFile(path string, readOnly bool) (db *bolt.DB, file *os.File, err error) {
	// It is there: whoever removes it meanwhile must not get a new one.
	db, file, err = openBolt(path, readOnly, 0)
	if err != nil {
		return nil, nil, readError(path, err)
	}
	opened, err := file.Stat()
	named, statError := os.Stat(path)
	if err = cmp.Or(err, statError); err == nil && !os.SameFile(opened, named) {
		// It was replaced while its lock was waited for, by who has the other one open.
		err = berrors.ErrTimeout
	}
	if err != nil {
		closeFile(db, file)
		return nil, nil, openError(path, err)
	}
	return db, file, nil
}

// openBolt opens a file with bbolt; create are flags to make it by.
func openBolt(path string, readOnly bool, create int) (db *bolt.DB, file *os.File, err error) {
	err = guard(func() (err error) {
		db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:         lockTimeout,
			FreelistType:    bolt.FreelistMapType,
			PreLoadFreelist: true,
			InitialMmapSize: mapSize,
			ReadOnly:        readOnly,
			OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
				f, err := os.OpenFile(name, flag&^os.O_CREATE|create, mode)
				file = f
				return f, err
			},
		})
		return err
	})
	if err != nil {
		if file != nil {
			_ = file.Close() // closed already, unless it was a panic
		}
		return nil, nil, err
	}
	db.AllocSize = growSize
	return db, file, nil
}

// closeFile closes the database also when bbolt has panicked and can't.
func closeFile(db *bolt.DB, file *os.File) {
	if guard(db.Close) != nil {
		_ = file.Close()
	}
}

// identify checks that it is a database which this program knows, and returns
// what its keys are.
func identify(tx *bolt.Tx, cfg Config, newest int) (kept storedKeys, err error) {
	damaged := func(why string) error { return damagedError(cfg.Path, why) }
	meta := tx.Bucket(bucketMeta)
	if meta == nil {
		return kept, damaged("it is no database of workspaced")
	}
	version, err := schemaOf(tx)
	switch {
	case err != nil || version == 0:
		return kept, damaged("it has no schema version")
	case version > uint64(newest):
		return kept, &OpenError{cfg.Path, ErrSchema, fmt.Sprintf(
			"has schema version %d and this program knows versions up to %d: run a newer one", version, newest)}
	}
	kept.instance = string(meta.Get(metaInstance))
	if kept.instance == "" || meta.Get(metaCheck) == nil {
		return kept, damaged("it has no identity")
	}
	if version >= keysVersion {
		var found bool
		if kept.wrapped, found, err = getKeys(tx); err != nil || !found {
			return kept, damaged("it has lost its data keys")
		}
	}
	return kept, nil
}

// verify checks that a database that was identified can be used as it is.
func verify(tx *bolt.Tx, cfg Config, sealer *seal.Sealer, newest int) error {
	damaged := func(format string, args ...any) error {
		return damagedError(cfg.Path, fmt.Sprintf(format, args...))
	}
	version, err := schemaOf(tx)
	if err != nil {
		return err
	}
	meta := tx.Bucket(bucketMeta)
	plain, err := sealer.Open(meta.Get(metaCheck), checkAssociated())
	if err != nil || string(plain) != string(meta.Get(metaInstance)) {
		return wrongKey(cfg.Path, cfg.KEK, storedKeys{})
	}
	if version == uint64(newest) { // an older one's rows are checked when it is migrated
		for _, name := range allBuckets {
			if tx.Bucket(name) == nil {
				return damaged("%s is missing", name)
			}
		}
	}
	bolts := parallel(func() error { return tx.DB().View(checkBolt) })
	if version == uint64(newest) {
		err = guard(func() error { // also after a panic bbolt's check is waited for
			return checkRows(tx, sealer, func(f func(*bolt.Tx) error) func() error {
				return parallel(func() error { return tx.DB().View(f) })
			})
		})
	}
	err = cmp.Or(err, bolts())
	var paniced *PanicError
	if err == nil || errors.As(err, &paniced) {
		return err
	}
	return damaged("%v", err)
}

// checkBolt is bbolt's own opinion.
func checkBolt(tx *bolt.Tx) (problem error) {
	for err := range tx.Check() { // its goroutine ends when all is told
		problem = err
	}
	return problem
}

func damagedError(path string, why any) error {
	return &OpenError{path, ErrDamaged, fmt.Sprintf("is damaged (%s): restore it from a backup", inShort(why))}
}

// openError says in one sentence what bbolt says in its own words.
func openError(path string, err error) error {
	var open *OpenError
	var paniced *PanicError
	switch {
	case errors.As(err, &open):
		return err
	case errors.Is(err, berrors.ErrTimeout):
		return &OpenError{path, ErrLocked, "is in use by another process"}
	case errors.As(err, &paniced):
		return damagedError(path, paniced.Value)
	}
	return fmt.Errorf("database %s can't be opened: %w", path, translate(err))
}

// readError is openError for what may be about the file's content.
func readError(path string, err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) || errors.Is(err, berrors.ErrTimeout) {
		return openError(path, err)
	}
	return damagedError(path, err)
}

// Close waits for the changes that were begun, refuses further ones with
// ErrClosed, and closes the database once its readers are done. It returns an
// error when the disk does not answer for 10 s: what was not acknowledged by
// then is in doubt.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.endLife()
		closed := make(chan error, 1)
		go func() { // outlives Close only with a hung disk, until the process ends
			s.writer.Wait()
			closed <- s.close()
		}()
		select {
		case s.closeErr = <-closed:
		case <-time.After(closeTimeout):
			s.closeErr = fmt.Errorf("database %s can't be closed: the disk has not answered for %v", s.cfg.Path, closeTimeout)
		}
	})
	return s.closeErr
}

// Ping returns nil once the writer's goroutine has answered, which is alive then
// and not held up by the disk, or why nothing is written any more: the database
// was found to be damaged. It touches neither file nor transaction.
func (s *Store) Ping(ctx context.Context) error {
	select {
	case s.pings <- struct{}{}:
		s.limits.mu.Lock()
		defer s.limits.mu.Unlock()
		return s.limits.writing
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closing:
		return ErrClosed
	}
}

// InstanceUID returns the uuid of this database, made when it was.
func (s *Store) InstanceUID() string { return s.instance }

// Commits counts the commits since Open, those that failed included. It is not
// settled while one is under way, which readers may see before its callers are
// answered. As long as a settled count stays the same, what was read after it was
// taken is the latest there is.
func (s *Store) Commits() (n uint64, settled bool) {
	n = s.commits.Load()
	return n, n%2 == 0
}

// Revision returns the revision of the last commit that changed a workspace.
func (s *Store) Revision() uint64 { return s.revision.Load() }
