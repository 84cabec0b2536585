package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"

	"slices"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

const (
	// maxKeyBytes bounds the names of one owner's secrets, which MaxWorkspaceBytes
	// and MaxGlobalBytes leave out.
	maxKeyBytes = 256 << 10
	// maxRetired is how many deleted keys of one owner keep a row of their own.
	maxRetired = 1024
)

// secretRecord is a secret's row, or what is left of a deleted one.
type secretRecord struct {
	Version    int64     `json:"version"`
	Deleted    bool      `json:"deleted,omitempty"`
	Size       int       `json:"size,omitempty"`
	CreateTime time.Time `json:"createTime,omitzero"`
	UpdateTime time.Time `json:"updateTime,omitzero"`
}

// ownerRecord sums up an owner's secrets.
type ownerRecord struct {
	Bytes    int `json:"bytes,omitempty"`    // of all values
	KeyBytes int `json:"keyBytes,omitempty"` // of all keys
	Retired  int `json:"retired,omitempty"`  // rows of deleted keys
	// LastVersion is no less than the version of any deleted key that has no row
	// any more.
	LastVersion int64 `json:"lastVersion,omitempty"`
}

// owner is whose secrets they are.
type owner struct {
	scope Scope
	uid   string // of the workspace
}

const globalOwner = "global"

func ownerOf(w *Workspace) owner { return owner{Scope{WorkspaceID: w.ID}, w.UID} }

// name is the owner's part of the rows' keys. No uid is "global".
func (o owner) name() string {
	if o.scope.Global() {
		return globalOwner
	}
	return o.uid
}

func (o owner) row(key string) []byte { return []byte(o.name() + "/" + key) }

// limit is how many bytes the owner's values may take.
func (o owner) limit() int {
	if o.scope.Global() {
		return MaxGlobalBytes
	}
	return MaxWorkspaceBytes
}

// associated binds a value to its place.
func (o owner) associated(key string, version int64) []byte {
	scope := "workspace"
	if o.scope.Global() {
		scope = globalOwner
	}
	return seal.AssociatedData("workspaced secret", scope, o.uid, key, strconv.FormatInt(version, 10))
}

func (o owner) metadata(key string, r *secretRecord) Secret {
	return Secret{
		Key: key, WorkspaceID: o.scope.WorkspaceID, Version: r.Version, Size: r.Size,
		CreateTime: r.CreateTime, UpdateTime: r.UpdateTime,
	}
}

// get returns the row of a secret that is there.
func (o owner) get(tx *bolt.Tx, key string) (r secretRecord, found bool, err error) {
	found, err = getRecord(tx, bucketSecrets, o.row(key), &r)
	return r, found && !r.Deleted, err
}

// each calls f with each row, also those of deleted keys, from the first key
// after the given one on, until f returns false.
func (o owner) each(tx *bolt.Tx, after string, f func(key string, r *secretRecord) bool) error {
	prefix := o.row("")
	c := tx.Bucket(bucketSecrets).Cursor()
	// No key contains a NUL: this is the first place behind after.
	seek := prefix
	if after != "" {
		seek = append(o.row(after), 0)
	}
	for k, v := c.Seek(seek); bytes.HasPrefix(k, prefix); k, v = c.Next() {
		var r secretRecord
		if err := decode(bucketSecrets, k, v, &r); err != nil {
			return err
		}
		if !f(string(k[len(prefix):]), &r) {
			break
		}
	}
	return nil
}

// open returns a secret's value, or a *KeyError.
func (o owner) open(tx *bolt.Tx, sealer *seal.Sealer, key string, r *secretRecord) (seal.Plaintext, error) {
	plain, err := sealer.Open(tx.Bucket(bucketSealed).Get(o.row(key)), o.associated(key, r.Version))
	if err != nil {
		return seal.Plaintext{}, &KeyError{Key: key, Err: ErrUnreadable}
	}
	return seal.New(plain), nil
}

// SecretsUpdate sets and deletes secrets of one scope, all or none.
type SecretsUpdate struct {
	// Set and Delete together name no key twice.
	Set    []SecretValue
	Delete []string
	// NextStart makes no generation: the next container that starts, for whatever
	// reason, gets the new values.
	NextStart bool
	// MustExist: deleting what is not there is a *NotFoundError.
	MustExist bool
}

// secretsPlan is an update that was checked.
type secretsPlan struct {
	owner   owner
	sums    ownerRecord
	sets    []plannedSet
	deletes []plannedDelete
}

type plannedSet struct {
	value   SecretValue
	row     secretRecord // as it will be
	retired bool         // the key was deleted
	changed bool
}

type plannedDelete struct {
	key string
	row secretRecord // as it is
}

func (p *secretsPlan) changedKeys() []string {
	var keys []string
	for _, set := range p.sets {
		if set.changed {
			keys = append(keys, set.value.Key)
		}
	}
	for _, d := range p.deletes {
		keys = append(keys, d.key)
	}
	return keys
}

func (p *secretsPlan) metadata() []Secret {
	var secrets []Secret
	for _, set := range p.sets {
		secrets = append(secrets, p.owner.metadata(set.value.Key, &set.row))
	}
	return secrets
}

// planSecrets checks an update and writes nothing.
func (t *txn) planSecrets(o owner, u *SecretsUpdate, etag string) (*secretsPlan, error) {
	p := &secretsPlan{owner: o}
	if _, err := getRecord(t.Tx, bucketOwners, []byte(o.name()), &p.sums); err != nil {
		return nil, err
	}
	if etag != "" && len(u.Set)+len(u.Delete) != 1 {
		return nil, errors.New("store: an etag belongs to exactly one secret")
	}
	seen := map[string]bool{}
	once := func(key string) error {
		if key == "" || seen[key] {
			return fmt.Errorf("store: key %q is empty or comes twice", key)
		}
		seen[key] = true
		return nil
	}

	for _, key := range u.Delete {
		if err := once(key); err != nil {
			return nil, err
		}
		r, found, err := o.get(t.Tx, key)
		if err != nil {
			return nil, err
		}
		if !found && u.MustExist {
			return nil, &NotFoundError{WorkspaceID: o.scope.WorkspaceID, Key: key}
		}
		if err := checkSecretEtag(o, key, &r, found, etag); err != nil {
			return nil, err
		}
		if found {
			p.sums.Bytes -= r.Size
			p.sums.KeyBytes -= len(key)
			p.deletes = append(p.deletes, plannedDelete{key, r})
		}
	}
	grows := false
	for _, value := range u.Set {
		if err := once(value.Key); err != nil {
			return nil, err
		}
		if n := value.Value.Len(); n > MaxValueBytes {
			return nil, &QuotaError{Scope: o.scope, Limit: MaxValueBytes, Size: n}
		}
		var old secretRecord
		known, err := getRecord(t.Tx, bucketSecrets, o.row(value.Key), &old)
		if err != nil {
			return nil, err
		}
		found := known && !old.Deleted
		if err := checkSecretEtag(o, value.Key, &old, found, etag); err != nil {
			return nil, err
		}
		if found && old.Size == value.Value.Len() {
			// One that can't be opened counts as different: setting it heals it.
			if plain, err := o.open(t.Tx, t.store.cfg.Sealer, value.Key, &old); err == nil && plain.Equal(value.Value) {
				p.sets = append(p.sets, plannedSet{value: value, row: old})
				continue
			}
		}
		row := secretRecord{
			Version:    old.Version + 1,
			Size:       value.Value.Len(),
			CreateTime: old.CreateTime,
			UpdateTime: t.now,
		}
		if !found {
			row.CreateTime = t.now
			p.sums.KeyBytes += len(value.Key)
		}
		if !known {
			row.Version = p.sums.LastVersion + 1
		}
		grows = grows || row.Size > old.Size || !found
		p.sums.Bytes += row.Size - old.Size
		p.sets = append(p.sets, plannedSet{value: value, row: row, retired: known && old.Deleted, changed: true})
	}
	if grows && p.sums.Bytes > o.limit() {
		return nil, &QuotaError{Scope: o.scope, Limit: o.limit(), Size: p.sums.Bytes}
	}
	if grows && p.sums.KeyBytes > maxKeyBytes {
		return nil, &QuotaError{Scope: o.scope, Limit: maxKeyBytes, Size: p.sums.KeyBytes}
	}
	return p, nil
}

func checkSecretEtag(o owner, key string, r *secretRecord, found bool, etag string) error {
	if etag == "" {
		return nil
	}
	if s := o.metadata(key, r); !found || s.Etag() != etag {
		return ErrEtag
	}
	return nil
}

// applySecrets writes what was planned.
func (t *txn) applySecrets(p *secretsPlan) error {
	o := p.owner
	for _, d := range p.deletes {
		if err := t.delete(bucketSealed, o.row(d.key)); err != nil {
			return err
		}
		p.sums.Retired++
		if err := t.putRecord(bucketSecrets, o.row(d.key), secretRecord{Version: d.row.Version, Deleted: true}); err != nil {
			return err
		}
	}
	for _, set := range p.sets {
		if !set.changed {
			continue
		}
		key := set.value.Key
		sealed, err := t.store.cfg.Sealer.Seal(set.value.Value.Bytes(), o.associated(key, set.row.Version))
		if err != nil {
			return err
		}
		if set.retired {
			p.sums.Retired--
		}
		if err := t.putRecord(bucketSecrets, o.row(key), set.row); err != nil {
			return err
		}
		if err := t.put(bucketSealed, o.row(key), sealed); err != nil {
			return err
		}
	}
	if p.sums.Retired > maxRetired {
		if err := t.foldRetired(p); err != nil {
			return err
		}
	}
	return t.putRecord(bucketOwners, []byte(o.name()), p.sums)
}

// foldRetired replaces the rows of an owner's deleted keys by one number: new
// keys begin above the highest version among them.
func (t *txn) foldRetired(p *secretsPlan) error {
	var keys []string
	err := p.owner.each(t.Tx, "", func(key string, r *secretRecord) bool {
		if r.Deleted {
			keys = append(keys, key)
			p.sums.LastVersion = max(p.sums.LastVersion, r.Version)
		}
		return true
	})
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := t.delete(bucketSecrets, p.owner.row(key)); err != nil {
			return err
		}
	}
	p.sums.Retired = 0
	return nil
}

// deleteOwner removes all that an owner has.
func (t *txn) deleteOwner(o owner) error {
	var keys []string
	err := o.each(t.Tx, "", func(key string, _ *secretRecord) bool {
		keys = append(keys, key)
		return true
	})
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := errors.Join(t.delete(bucketSecrets, o.row(key)), t.delete(bucketSealed, o.row(key))); err != nil {
			return err
		}
	}
	return t.delete(bucketOwners, []byte(o.name()))
}

// UpdateSecrets sets and deletes secrets of a workspace, or global ones, in one
// transaction: all or none, and at most one new generation a workspace. A global
// one reaches, by a new generation, every workspace that has no secret of its
// own under the key and is not being deleted.
//
// Errors: *NotFoundError, ErrDeleting, ErrEtag (Options.Etag is the one
// secret's), *KeyError with ErrModelKey, *QuotaError, ErrRequestReused,
// ErrDiskFull.
func (s *Store) UpdateSecrets(ctx context.Context, scope Scope, u SecretsUpdate, opts Options) (Result, error) {
	u.Set, u.Delete = slices.Clone(u.Set), slices.Clone(u.Delete)
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		if scope.Global() {
			return t.updateGlobalSecrets(&u, opts.Etag)
		}
		return t.updateOwnSecrets(scope.WorkspaceID, &u, opts.Etag)
	})
}

func (t *txn) updateOwnSecrets(id string, u *SecretsUpdate, etag string) (Result, error) {
	w, err := getWorkspace(t.Tx, id)
	if err != nil {
		return Result{}, err
	}
	if w.Deleting != nil {
		return Result{}, ErrDeleting
	}
	vars := w.Spec.ModelVars()
	for _, value := range u.Set {
		if slices.Contains(vars, value.Key) {
			return Result{}, &KeyError{Key: value.Key, Err: ErrModelKey}
		}
	}
	p, err := t.planSecrets(ownerOf(&w), u, etag)
	if err != nil {
		return Result{}, err
	}
	result := Result{Secrets: p.metadata()}
	if len(p.changedKeys()) > 0 {
		if err := t.applySecrets(p); err != nil {
			return Result{}, err
		}
		w.UpdateTime = t.now
		if !u.NextStart {
			t.bump(&w, ReasonSecret)
			result.Affected = 1
		}
		if err := t.putWorkspace(&w, Change{Desired: !u.NextStart}); err != nil {
			return Result{}, err
		}
		result.Changed = true
	}
	result.Workspace = w
	return result, nil
}

func (t *txn) updateGlobalSecrets(u *SecretsUpdate, etag string) (Result, error) {
	p, err := t.planSecrets(owner{}, u, etag)
	if err != nil {
		return Result{}, err
	}
	result := Result{Secrets: p.metadata()}
	keys := p.changedKeys()
	if len(keys) == 0 {
		return result, nil
	}
	var ids []string
	if !u.NextStart {
		if ids, err = t.affectedBy(keys); err != nil {
			return Result{}, err
		}
	}
	if err := t.applySecrets(p); err != nil {
		return Result{}, err
	}
	for _, id := range ids {
		w, err := getWorkspace(t.Tx, id)
		if err != nil {
			return Result{}, err
		}
		t.bump(&w, ReasonGlobalSecret)
		if err := t.putWorkspace(&w, Change{Desired: true}); err != nil {
			return Result{}, err
		}
	}
	result.Changed = true
	result.Affected = len(ids)
	return result, nil
}

// affectedBy returns the workspaces that see a change of one of these global
// keys.
func (t *txn) affectedBy(keys []string) ([]string, error) {
	var ids []string
	c := t.Bucket(bucketWorkspaces).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		var w struct {
			UID      string    `json:"uid"`
			Deleting *Deleting `json:"deleting"`
		}
		if err := decode(bucketWorkspaces, k, v, &w); err != nil {
			return nil, err
		}
		if w.Deleting != nil {
			continue
		}
		own := owner{Scope{WorkspaceID: string(k)}, w.UID}
		for _, key := range keys {
			_, shadowed, err := own.get(t.Tx, key)
			if err != nil {
				return nil, err
			}
			if !shadowed {
				ids = append(ids, string(k))
				break
			}
		}
	}
	return ids, nil
}

// ownerIn finds the owner of a scope; *NotFoundError when there is no such
// workspace.
func ownerIn(tx *bolt.Tx, scope Scope) (owner, error) {
	if scope.Global() {
		return owner{}, nil
	}
	w, err := getWorkspace(tx, scope.WorkspaceID)
	return ownerOf(&w), err
}

// Secret returns one secret's metadata, or a *NotFoundError.
func (s *Store) Secret(scope Scope, key string) (secret Secret, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		o, err := ownerIn(tx, scope)
		if err != nil {
			return err
		}
		r, found, err := o.get(tx, key)
		if err == nil && !found {
			err = &NotFoundError{WorkspaceID: scope.WorkspaceID, Key: key}
		}
		secret = o.metadata(key, &r)
		return err
	})
	if err != nil {
		return Secret{}, err
	}
	return secret, nil
}

// ListSecrets returns the metadata of a scope's secrets whose key comes after
// the given one, by key, at most limit (0: all), and whether there are more. It
// returns a *NotFoundError when there is no such workspace.
func (s *Store) ListSecrets(scope Scope, after string, limit int) (secrets []Secret, more bool, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		o, err := ownerIn(tx, scope)
		if err != nil {
			return err
		}
		return o.each(tx, after, func(key string, r *secretRecord) bool {
			switch {
			case r.Deleted:
			case limit > 0 && len(secrets) == limit:
				more = true
				return false
			default:
				secrets = append(secrets, o.metadata(key, r))
			}
			return true
		})
	})
	if err != nil {
		return nil, false, err
	}
	return secrets, more, nil
}

// Snapshot returns a workspace with the values of all the secrets that its
// container gets, from one read transaction: the global ones and its own, which
// win, by key. It returns a *NotFoundError, or a *KeyError with ErrUnreadable
// when one of them can't be opened.
func (s *Store) Snapshot(id string) (snapshot Snapshot, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		w, err := getWorkspace(tx, id)
		if err != nil {
			return err
		}
		type source struct {
			owner owner
			row   secretRecord
		}
		merged := map[string]source{}
		for _, o := range []owner{{}, ownerOf(&w)} {
			err := o.each(tx, "", func(key string, r *secretRecord) bool {
				if !r.Deleted {
					merged[key] = source{o, *r}
				}
				return true
			})
			if err != nil {
				return err
			}
		}
		snapshot.Workspace = w
		for key, from := range merged {
			value, err := from.owner.open(tx, s.cfg.Sealer, key, &from.row)
			if err != nil {
				return err
			}
			snapshot.Secrets = append(snapshot.Secrets, OpenedSecret{Key: key, Version: from.row.Version, Value: value})
		}
		return nil
	})
	if err != nil {
		return Snapshot{}, err
	}
	slices.SortFunc(snapshot.Secrets, func(a, b OpenedSecret) int { return cmp.Compare(a.Key, b.Key) })
	return snapshot, nil
}
