package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
	"github.com/workspaced/workspaced/store/seal/kek"
)

// checkKeys says what is wrong with the keys' URIs, without quoting them: somebody
// may have put a key there.
func (c *config) checkKeys() error {
	if c.KeyURI == "" {
		c.KeyURI = kek.FileURI(c.keyFile())
	}
	if err := kek.Check(c.KeyURI); err != nil {
		return &settingError{"key_uri", err}
	}
	if c.PreviousKeyURI == "" {
		return nil
	}
	if err := kek.Check(c.PreviousKeyURI); err != nil {
		return &settingError{"previous_key_uri", err}
	}
	if c.PreviousKeyURI == c.KeyURI {
		return bad("previous_key_uri", "is the same as key_uri: it is for a key that was replaced")
	}
	return nil
}

// openKeys opens the keys that the configuration names, and takes what they are
// made of out of the environment before anything is started that would inherit it.
// A key file is only made together with a database, or to replace another key: a
// new one opens nothing that an old one has sealed. The keys work until ctx ends.
func openKeys(ctx context.Context, cfg config) (key, previous seal.KEK, err error) {
	_, err = os.Stat(cfg.database())
	isNew := errors.Is(err, fs.ErrNotExist)
	key, err = kek.Open(ctx, cfg.KeyURI, isNew || cfg.PreviousKeyURI != "")
	switch path, isFile := strings.CutPrefix(cfg.KeyURI, "file://"); {
	case errors.Is(err, fs.ErrNotExist) && isFile && !isNew:
		return nil, nil, fmt.Errorf("the database %s is there, but its key file %s is not: put it back from a backup", cfg.database(), path)
	case err != nil:
		return nil, nil, fmt.Errorf("key_uri: %w", err)
	}
	if cfg.PreviousKeyURI != "" {
		if previous, err = kek.Open(ctx, cfg.PreviousKeyURI, false); err != nil {
			return nil, nil, fmt.Errorf("previous_key_uri: %w; if the database has the new key already, remove the setting", err)
		}
	}
	return key, previous, kek.ClearEnv(cfg.KeyURI, cfg.PreviousKeyURI)
}

// keyAttempt is more than an attempt to open the database takes.
const keyAttempt = 60 * time.Second

// The waits between attempts, while a key service does not answer. Tests change the
// first.
var firstKeyWait, longestKeyWait = time.Second, 15 * time.Second

// openStore opens the database. A key service that does not answer, as after a
// reboot in which it comes up later than we, is waited for until ctx ends; what it
// refuses is an error at once.
func openStore(ctx context.Context, cfg config, log *slog.Logger, onCommit func([]store.Change)) (*store.Store, error) {
	key, previous, err := openKeys(ctx, cfg)
	if err != nil {
		return nil, err
	}
	waits := backoff.NewExponentialBackOff()
	waits.InitialInterval, waits.MaxInterval = firstKeyWait, longestKeyWait
	for attempt := 1; ; attempt++ {
		st, err := store.Open(store.Config{
			Path: cfg.database(), KEK: key, FormerKEK: previous, OnCommit: onCommit, Logger: log, Around: faultPoints(),
			SecretVersions: cfg.SecretVersions,
			Audit:          store.AuditPolicy{MaxBytes: int64(cfg.AuditMaxMiB) << 20, MaxAge: cfg.AuditMaxAge}, Quotas: cfg.quotas(),
		})
		switch {
		case err == nil && attempt > 1:
			log.Info("the key service has given the key", "attempt", attempt)
			return st, nil
		case errors.Is(err, store.ErrWrongKey) && previous == nil:
			return nil, fmt.Errorf("%w; or, if key_uri is meant to replace it, name the old one in previous_key_uri", err)
		case !errors.Is(err, kek.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded): // the store's, for several calls
			return st, err
		}
		wait := waits.NextBackOff()
		log.Warn("the key service does not give the key now, so nothing can be started", "error", err, "attempt", attempt, "next_attempt_in", wait.Round(time.Millisecond))
		notify(log, fmt.Sprintf("STATUS=Waiting for the key service, attempt %d\nEXTEND_TIMEOUT_USEC=%d", attempt, (wait+keyAttempt).Microseconds()))
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(wait):
		}
	}
}

// notify tells the service manager, if there is one.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("the service manager could not be told", "state", state, "error", err)
	}
}

// generateKey prints a new key, for env:// and credential://.
func generateKey(out io.Writer) error {
	b, err := seal.NewLocal()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n", b)
	return err
}
