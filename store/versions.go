package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// A key has its last versions, the current one among them; how many says
// Config.SecretVersions. The row in secrets tells of all of them, and each has a row
// of its own in sealed, unless it was destroyed. A new version takes the place of
// the oldest one: what is above the number goes then, and with a deleted key all.

// How many versions of a secret there are.
const (
	DefaultSecretVersions = 5
	MaxSecretVersions     = 100
)

// VersionState says whether a secret can be rolled back to a version. The values
// are those of workspace.v1.SecretVersionState without the prefix.
type VersionState string

// The states.
const (
	VersionEnabled VersionState = "ENABLED"
	// VersionDisabled: nobody rolls back to it, until it is enabled again.
	VersionDisabled VersionState = "DISABLED"
	// VersionDestroyed: its value is gone.
	VersionDestroyed VersionState = "DESTROYED"
)

// SecretVersion is the metadata of a secret's version.
type SecretVersion struct {
	Key string
	// WorkspaceID is empty for a global secret.
	WorkspaceID string
	Version     int64
	Size        int
	CreateTime  time.Time
	State       VersionState
	// Current: it is the one that containers get. It is always enabled.
	Current bool
	// Restored is the version whose value was made this one's by a rollback; 0:
	// none's.
	Restored int64
	// Delivery is never empty.
	Delivery Delivery
}

// RollBack says that a secret is to get value and delivery of an older version again.
type RollBack struct {
	Key     string
	Version int64
}

// versionRecord is an older version in a secretRecord.
type versionRecord struct {
	Version    int64     `json:"version"`
	Size       int       `json:"size,omitempty"`
	CreateTime time.Time `json:"createTime,omitzero"`
	Restored   int64     `json:"restored,omitempty"`
	// Delivery is empty for DeliverySpec.
	Delivery Delivery `json:"delivery,omitempty"`
	// State is empty for VersionEnabled.
	State VersionState `json:"state,omitempty"`
}

func (v *versionRecord) valid(newer int64) bool {
	return v.Version > 0 && v.Version < newer && v.Size >= 0 &&
		v.Delivery.stored() && (v.State == "" || v.State == VersionDisabled || v.State == VersionDestroyed)
}

// current is the current version as an older one will be.
func (r *secretRecord) current() versionRecord {
	return versionRecord{Version: r.Version, Size: r.Size, CreateTime: r.UpdateTime, Restored: r.Restored, Delivery: r.Delivery}
}

// older returns the version among the older ones; nil: there is no such one.
func (r *secretRecord) older(version int64) *versionRecord {
	i := slices.IndexFunc(r.Older, func(v versionRecord) bool { return v.Version == version })
	if i < 0 {
		return nil
	}
	return &r.Older[i]
}

// next returns the older versions of the version after the current one, when there
// are to be so many in all.
func (r *secretRecord) next(versions int) []versionRecord {
	older := append([]versionRecord{r.current()}, r.Older...)
	return older[:min(len(older), versions-1)]
}

// hasValue reports whether there is a value of the version.
func (r *secretRecord) hasValue(version int64) bool {
	if version == r.Version {
		return !r.Deleted
	}
	v := r.older(version)
	return v != nil && v.State != VersionDestroyed
}

func (o owner) version(key string, v *versionRecord, current bool) SecretVersion {
	state := v.State
	if state == "" {
		state = VersionEnabled
	}
	return SecretVersion{
		Key: key, WorkspaceID: o.scope.WorkspaceID, Version: v.Version, Size: v.Size, CreateTime: v.CreateTime,
		State: state, Current: current, Restored: v.Restored, Delivery: v.Delivery.known(),
	}
}

// A key of sealed is the one of secrets, a NUL, which no secret's key has, and the
// version: so both buckets have the same order.

func (o owner) value(key string, version int64) []byte {
	return append(valuesOf(o.row(key)), number(uint64(version))...)
}

// valuesOf is the prefix of the values of a row in secrets.
func valuesOf(row []byte) []byte { return append(slices.Clone(row), 0) }

// parseValue takes apart what value and row made.
func parseValue(k []byte) (row []byte, version int64, err error) {
	at := len(k) - 8 - 1
	if at <= 0 || k[at] != 0 {
		return nil, 0, &RowError{string(bucketSealed), string(k)}
	}
	n, err := parseNumber(bucketSealed, k, k[at+1:])
	return k[:at], int64(n), err
}

// newestValue returns the last value under a row in secrets, sealed; nil: there is
// none.
func newestValue(tx *bolt.Tx, row []byte) (k, v []byte) {
	c := tx.Bucket(bucketSealed).Cursor()
	last := append(slices.Clone(row), 1) // the first place behind them
	if k, _ = c.Seek(last); k == nil {
		k, v = c.Last()
	} else {
		k, v = c.Prev()
	}
	if !bytes.HasPrefix(k, valuesOf(row)) {
		return nil, nil
	}
	return k, v
}

// eachValued calls f with each key that has a value, in order. It looks at one or two
// values of each.
func (o owner) eachValued(tx *bolt.Tx, f func(key string)) error {
	prefix := o.row("")
	c := tx.Bucket(bucketSealed).Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); {
		row, _, err := parseValue(k)
		if err != nil {
			return err
		}
		f(string(row[len(prefix):]))
		last := append(slices.Clone(row), 1) // the first place behind its values
		if k, _ = c.Seek(last); k != nil && bytes.Compare(k, last) < 0 {
			return &RowError{string(bucketSealed), string(k)} // a damaged page: it would have no end
		}
	}
	return nil
}

// keepValues removes the values of a key, but those of the versions that are to be
// kept. What the row does not know of goes too.
func (t *txn) keepValues(o owner, key string, keep func(version int64) bool) error {
	prefix := valuesOf(o.row(key))
	var gone [][]byte
	c := t.Bucket(bucketSealed).Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		if _, version, err := parseValue(k); err != nil || !keep(version) {
			gone = append(gone, slices.Clone(k))
		}
	}
	for _, k := range gone {
		if err := t.delete(bucketSealed, k); err != nil {
			return err
		}
	}
	return nil
}

// nameValues is the migration to version 8. The values that were there are the
// current ones, and their version is part of what they were sealed with. One whose
// row can't be read has no version any more, and can't be opened.
func nameValues(tx *bolt.Tx, _ *seal.Sealer) error {
	sealed := tx.Bucket(bucketSealed)
	var keys [][]byte
	if err := sealed.ForEach(func(k, _ []byte) error {
		keys = append(keys, slices.Clone(k))
		return nil
	}); err != nil {
		return err
	}
	for _, k := range keys {
		var version uint64
		var r secretRecord
		if found, err := getRecord(tx, bucketSecrets, k, &r); found && err == nil {
			version = uint64(r.Version)
		}
		value := slices.Clone(sealed.Get(k))
		if err := errors.Join(sealed.Delete(k), sealed.Put(append(valuesOf(k), number(version)...), value)); err != nil {
			return err
		}
	}
	return nil
}

// ListSecretVersions returns the metadata of a secret's versions, newest first,
// those below the given one (0: all), at most limit (0: all), and whether there are
// more. Errors: *NotFoundError, *KeyError with ErrUnreadable when the secret's row
// is damaged.
func (s *Store) ListSecretVersions(scope Scope, key string, below int64, limit int) (versions []SecretVersion, more bool, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		o, r, err := secretIn(tx, scope, key)
		if err != nil {
			return err
		}
		for i, v := range append([]versionRecord{r.current()}, r.Older...) {
			switch {
			case below != 0 && v.Version >= below:
			case limit > 0 && len(versions) == limit:
				more = true
				return nil
			default:
				versions = append(versions, o.version(key, &v, i == 0))
			}
		}
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	return versions, more, nil
}

// SetVersionState enables, disables or destroys a version of a secret. It makes no
// generation: the current version can only be enabled, which it is. What is
// destroyed stays so.
//
// Errors: *NotFoundError, *KeyError with ErrUnreadable when the secret's row is
// damaged, *VersionError with ErrVersionCurrent or ErrVersionDestroyed,
// ErrDeleting, ErrRequestReused, ErrDiskFull.
func (s *Store) SetVersionState(ctx context.Context, scope Scope, key string, version int64, state VersionState, opts Options) (Result, error) {
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		var result Result
		o := owner{}
		if !scope.Global() {
			w, err := t.editWorkspace(scope.WorkspaceID, &Options{Allow: opts.Allow})
			if err != nil {
				return Result{}, err
			}
			if w.Deleting != nil {
				return Result{}, ErrDeleting
			}
			result.Workspace, o = w, ownerOf(&w)
		}
		sums, x, err := openOwner(t.Tx, t.store.sealer, o.name())
		if err != nil {
			return Result{}, err
		}
		r, err := o.find(t.Tx, &x, key)
		if err != nil {
			return Result{}, err
		}
		if version == r.Version {
			if state != VersionEnabled {
				return Result{}, &VersionError{Key: key, Version: version, Err: ErrVersionCurrent}
			}
			current := r.current()
			result.Version = o.version(key, &current, true)
			return result, nil
		}
		v := r.older(version)
		switch {
		case v == nil:
			return Result{}, &NotFoundError{WorkspaceID: scope.WorkspaceID, Key: key, Version: version}
		case v.State == VersionDestroyed && state != VersionDestroyed:
			return Result{}, &VersionError{Key: key, Version: version, Err: ErrVersionDestroyed}
		}
		before := *v
		switch state {
		case VersionEnabled:
			v.State = ""
		case VersionDisabled, VersionDestroyed:
			v.State = state
		default:
			return Result{}, fmt.Errorf("store: no state of a version: %q", state)
		}
		result.Version = o.version(key, v, false)
		if *v == before {
			return result, nil
		}
		result.Changed = true
		return result, errors.Join(
			t.putSecret(o, key, &r, &x), t.putOwner(o, &sums, x), t.keepValues(o, key, r.hasValue))
	})
}

// restore returns what the secret gets by the version that a secret is to be rolled back to.
func (t *txn) restore(o owner, x *index, back *RollBack) (SecretValue, error) {
	r, err := o.find(t.Tx, x, back.Key)
	if err != nil {
		return SecretValue{}, err
	}
	failed := func(err error) (SecretValue, error) {
		return SecretValue{}, &VersionError{Key: back.Key, Version: back.Version, Err: err}
	}
	current := r.current()
	v := &current
	if back.Version != r.Version {
		v = r.older(back.Version)
		switch {
		case v == nil:
			return SecretValue{}, &NotFoundError{WorkspaceID: o.scope.WorkspaceID, Key: back.Key, Version: back.Version}
		case v.State == VersionDisabled:
			return failed(ErrVersionDisabled)
		case v.State == VersionDestroyed:
			return failed(ErrVersionDestroyed)
		}
	}
	value, err := o.openVersion(t.Tx, t.store.sealer, back.Key, back.Version)
	if err != nil {
		return failed(ErrUnreadable)
	}
	return SecretValue{Key: back.Key, Value: value, Delivery: v.Delivery.known()}, nil
}
