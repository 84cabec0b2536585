package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// What is sealed is sealed with data keys. These are in meta, wrapped by a KEK
// that is kept elsewhere, so that the database by itself is worth nothing and a
// rotation changes nothing outside of it.

// keysVersion is the schema version from which on databases have data keys.
const keysVersion = 10

// kekTimeout bounds a call of the KEK.
const kekTimeout = 15 * time.Second

// storedWrapped is the row keys in meta.
type storedWrapped struct {
	seal.Wrapped
	// RotateTime is when the newest key was made by a rotation; zero for the first.
	RotateTime time.Time `json:"rotateTime,omitzero"`
}

// storedKeys is what a database says of its keys.
type storedKeys struct {
	instance string
	wrapped  storedWrapped // none before keysVersion
}

func getKeys(tx *bolt.Tx) (w storedWrapped, found bool, err error) {
	found, err = getRecord(tx, bucketMeta, metaKeys, &w)
	return w, found, err
}

func putKeys(tx *bolt.Tx, w storedWrapped) error {
	b, err := json.Marshal(w)
	if err != nil {
		return err
	}
	return tx.Bucket(bucketMeta).Put(metaKeys, b)
}

// openedKeys are a database's keys, and what has to be done to keep them.
type openedKeys struct {
	sealer *seal.Sealer
	kept   storedKeys
	direct bool // the sealer's keys are the KEK's own
	rewrap bool // another KEK has wrapped them
}

// openKeys unwraps a database's keys. It writes nothing.
func openKeys(ctx context.Context, cfg *Config, kept storedKeys) (keys openedKeys, err error) {
	keys.kept = kept
	if len(kept.wrapped.Keys) == 0 {
		keys.direct = true
		local, ok := cfg.KEK.(*seal.Local)
		if former, isLocal := cfg.FormerKEK.(*seal.Local); isLocal {
			local, ok = former, true
		}
		if !ok {
			return keys, &OpenError{cfg.Path, ErrWrongKey, "is of a version that sealed with its key file: give that as the former key"}
		}
		keys.sealer, err = seal.Direct(local)
		return keys, err
	}
	keys.sealer, err = seal.Unwrap(ctx, cfg.KEK, kept.instance, kept.wrapped.Wrapped)
	if err == nil || cfg.FormerKEK == nil {
		return keys, unwrapError(cfg, kept, err)
	}
	keys.sealer, err = seal.Unwrap(ctx, cfg.FormerKEK, kept.instance, kept.wrapped.Wrapped)
	keys.rewrap = true
	return keys, unwrapError(cfg, kept, err)
}

// carryOver returns what has to be stored as the database's keys before they are
// used; nil: they are. Keys that a key file has sealed with directly are replaced
// by a rotation, like any others.
func (k *openedKeys) carryOver(ctx context.Context, cfg *Config) (*storedWrapped, error) {
	switch {
	case k.direct:
		rotation, err := k.sealer.Rotate(ctx, cfg.KEK, k.kept.instance)
		if err != nil {
			return nil, unwrapError(cfg, k.kept, err)
		}
		k.sealer.Use(rotation)
		return &storedWrapped{Wrapped: rotation.Wrapped, RotateTime: utc(cfg.Now())}, nil
	case k.rewrap:
		wrapped, err := k.sealer.Wrap(ctx, cfg.KEK, k.kept.instance)
		return &storedWrapped{Wrapped: wrapped, RotateTime: k.kept.wrapped.RotateTime}, unwrapError(cfg, k.kept, err)
	}
	return nil, nil
}

func createError(cfg *Config, err error) error {
	var kek *seal.KEKError
	if errors.As(err, &kek) {
		return &OpenError{cfg.Path, fmt.Errorf("%w: %w", ErrKEK, kek.Err), fmt.Sprintf("can't be made without a key, which %s does not give: %v", kek.Name, kek.Err)}
	}
	return fmt.Errorf("database %s can't be made: %w", cfg.Path, translate(err))
}

func wrongKey(path string, kek seal.KEK, kept storedKeys) error {
	it := "the one that belongs to it"
	if name := kept.wrapped.KEK; name != "" && name != kek.Name() {
		it = "that of the " + name
	}
	return &OpenError{path, ErrWrongKey, fmt.Sprintf("was sealed with another key than that of the %s: give %s", kek.Name(), it)}
}

// unwrapError says in one sentence what a KEK did not do.
func unwrapError(cfg *Config, kept storedKeys, err error) error {
	var kek *seal.KEKError
	switch {
	case !errors.As(err, &kek):
		return err
	case errors.Is(err, seal.ErrOpen):
		return wrongKey(cfg.Path, cfg.KEK, kept)
	}
	return &OpenError{cfg.Path, fmt.Errorf("%w: %w", ErrKEK, kek.Err), fmt.Sprintf("can't be opened without its key, which %s does not give: %v", kek.Name, kek.Err)}
}
