package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// SecretsUpdate sets and deletes secrets of one scope and rolls back one, all or
// none.
type SecretsUpdate struct {
	// Set, Delete and RollBack together name no key twice.
	Set      []SecretValue
	Delete   []string
	RollBack *RollBack
	// NextStart makes no generation: the next container that starts, for whatever
	// reason, gets the new values. Made again without it the same change counts as
	// one, for nobody here knows which containers have it.
	NextStart bool
	// Live makes a generation that running containers take in: of files only, which
	// are rotated in place. Not together with NextStart.
	Live bool
	// MustExist: deleting what is not there is a *NotFoundError.
	MustExist bool
}

// bump makes the new generation of a workspace that sees the update.
func (u *SecretsUpdate) bump(w *Workspace, reason ChangeReason, now time.Time) {
	if u.Live {
		bumpLive(w, reason, now)
		return
	}
	bump(w, reason, now)
}

// secretsPlan is an update that was checked.
type secretsPlan struct {
	owner   owner
	staged  bool
	grows   bool // some value, or how many there are
	sums    sums
	bytes   int // sums.bytes before
	index   index
	sets    []plannedSet
	deletes []plannedDelete
}

type plannedSet struct {
	value   SecretValue
	row     secretRecord // as it will be
	retired bool         // the key was deleted
	changed bool         // the row differs
	sealed  bool         // and so does the value
}

type plannedDelete struct {
	key string
	row secretRecord // as it is
	// variable is secretRecord.Variable of what is left.
	variable bool
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

// planSecrets checks an update and writes nothing. The spec is that of the
// workspace, nil for global secrets.
func (t *txn) planSecrets(o owner, spec *Spec, u *SecretsUpdate, etag string) (*secretsPlan, error) {
	p := &secretsPlan{owner: o, staged: u.NextStart}
	var err error
	if p.sums, p.index, err = openOwner(t.Tx, t.store.sealer, o.name()); err != nil {
		return nil, err
	}
	p.bytes = p.sums.bytes
	sets := u.Set
	if u.RollBack != nil {
		value, err := t.restore(o, &p.index, u.RollBack)
		if err != nil {
			return nil, err
		}
		sets = append(slices.Clone(u.Set), value)
	}
	if etag != "" && len(sets)+len(u.Delete) != 1 {
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
		if err := cmp.Or(once(key), t.planDelete(p, spec, u, key, etag)); err != nil {
			return nil, err
		}
	}
	for i, value := range sets {
		var restored int64
		if i == len(u.Set) {
			restored = u.RollBack.Version
		}
		if err := cmp.Or(once(value.Key), t.planSet(p, spec, u, value, restored, etag)); err != nil {
			return nil, err
		}
	}
	if p.sums.bytes > o.limit() && p.grows {
		return nil, &QuotaError{Scope: o.scope, Limit: o.limit(), Size: p.sums.bytes}
	}
	if p.sums.keyBytes > maxKeyBytes && p.grows {
		return nil, &QuotaError{Scope: o.scope, Limit: maxKeyBytes, Size: p.sums.keyBytes}
	}
	if err := t.checkQuotas(p); err != nil {
		return nil, err
	}
	return p, nil
}

// planDelete plans the deletion of a secret, if there is one.
func (t *txn) planDelete(p *secretsPlan, spec *Spec, u *SecretsUpdate, key, etag string) error {
	o := p.owner
	r, known := o.get(t.Tx, &p.index, key)
	found := known && !r.Deleted
	// Deleted for the next start only, until now.
	unstaged := known && r.Deleted && r.Staged && !u.NextStart
	if !found && !unstaged && u.MustExist {
		return &NotFoundError{WorkspaceID: o.scope.WorkspaceID, Key: key}
	}
	if err := checkSecretEtag(o, key, &r, found, etag); err != nil {
		return err
	}
	if r.damaged {
		r.Version = t.unusedVersion(&p.sums)
	}
	if !found && !unstaged {
		return nil
	}
	variable := o.variable(t.Tx, spec, key, &r, known)
	// A global one that it has hidden takes its place.
	if u.Live && (variable || !o.scope.Global() && variableGlobal(t.Tx, spec, key)) {
		return &KeyError{Key: key, Err: ErrNotLive}
	}
	if found {
		p.sums.bytes -= r.Size
		p.sums.keyBytes -= len(key)
	}
	p.deletes = append(p.deletes, plannedDelete{key, r, variable && u.NextStart})
	return nil
}

// planSet plans that a secret is set, by a rollback if a version is restored.
func (t *txn) planSet(p *secretsPlan, spec *Spec, u *SecretsUpdate, value SecretValue, restored int64, etag string) error {
	o, key := p.owner, value.Key
	if n := value.Value.Len(); n > MaxValueBytes {
		return &QuotaError{Scope: o.scope, Limit: MaxValueBytes, Size: n}
	}
	old, known := o.get(t.Tx, &p.index, key)
	found := known && !old.Deleted
	if err := checkSecretEtag(o, key, &old, found, etag); err != nil {
		return err
	}
	delivery := value.Delivery
	switch {
	case delivery == "" && found:
		delivery = old.Delivery
	case delivery == DeliverySpec:
		delivery = ""
	}
	file, variable := deliversFile(delivery.known(), spec), o.variable(t.Tx, spec, key, &old, known)
	binary := strings.ContainsRune(value.Value.Reveal(), 0)
	switch {
	case binary && !file:
		return &KeyError{Key: key, Err: ErrNeedsFiles}
	case u.Live && (variable || !file):
		return &KeyError{Key: key, Err: ErrNotLive}
	}
	if found && !old.damaged && old.Size == value.Value.Len() && old.Delivery == delivery {
		// One that can't be opened counts as different: setting it heals it.
		if plain, err := o.open(t.Tx, t.store.sealer, key, &old); err == nil && plain.Equal(value.Value) {
			unstaged := old.Staged && !u.NextStart
			old.Staged, old.Variable = old.Staged && u.NextStart, old.Variable && u.NextStart
			p.sets = append(p.sets, plannedSet{value: value, row: old, changed: unstaged})
			return nil
		}
	}
	var older []versionRecord
	switch {
	case old.damaged: // nobody knows of the others whether they are disabled
		old.Version, old.CreateTime = t.unusedVersion(&p.sums), t.now
	case found:
		older = old.next(t.store.cfg.SecretVersions)
	}
	row := secretRecord{
		Version:    old.Version + 1,
		Size:       value.Value.Len(),
		CreateTime: old.CreateTime,
		UpdateTime: t.now,
		Delivery:   delivery,
		Binary:     binary,
		Staged:     u.NextStart,
		Variable:   variable && u.NextStart,
		Restored:   restored,
		Older:      older,
	}
	if !found {
		row.CreateTime = t.now
		p.sums.keyBytes += len(key)
	}
	if !known {
		row.Version = p.sums.lastVersion + 1
	}
	p.grows = p.grows || row.Size > old.Size || !found
	p.sums.bytes += row.Size - old.Size
	p.sets = append(p.sets, plannedSet{value: value, row: row, retired: known && old.Deleted, changed: true, sealed: true})
	return nil
}

// unusedVersion returns a version above any that a damaged row can have had.
func (t *txn) unusedVersion(sums *sums) int64 {
	return max(sums.lastVersion, int64(t.revision), t.now.Unix()) + 1
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
		if !d.row.Deleted {
			if err := t.keepValues(o, d.key, func(int64) bool { return false }); err != nil {
				return err
			}
			p.sums.retired++
		}
		if err := t.putSecret(o, d.key, &secretRecord{
			Version: d.row.Version, Deleted: true, Staged: p.staged, Variable: d.variable,
		}, &p.index); err != nil {
			return err
		}
	}
	for _, set := range p.sets {
		if !set.changed {
			continue
		}
		key := set.value.Key
		if err := t.putSecret(o, key, &set.row, &p.index); err != nil {
			return err
		}
		if !set.sealed {
			continue
		}
		sealed, err := t.store.sealer.Seal(set.value.Value.Bytes(), o.associated(key, set.row.Version))
		if err != nil {
			return err
		}
		if set.retired {
			p.sums.retired--
		}
		if err := t.renew(bucketSealed, o.value(key, set.row.Version), sealed); err != nil {
			return err
		}
		if err := t.keepValues(o, key, set.row.hasValue); err != nil {
			return err
		}
	}
	if p.sums.retired > maxRetired {
		if err := t.foldRetired(p); err != nil {
			return err
		}
	}
	return t.putOwner(o, &p.sums, p.index)
}

// foldRetired replaces the rows of an owner's deleted keys by one number: new
// keys begin above the highest version among them.
func (t *txn) foldRetired(p *secretsPlan) error {
	var keys []string
	p.owner.each(t.Tx, &p.index, "", func(key string, r *secretRecord) bool {
		if r.Deleted {
			keys = append(keys, key)
			p.sums.lastVersion = max(p.sums.lastVersion, r.Version)
		}
		return true
	})
	for _, key := range keys {
		if err := t.putSecret(p.owner, key, nil, &p.index); err != nil {
			return err
		}
	}
	p.sums.retired = 0
	return nil
}

// deleteOwner removes all that an owner has.
func (t *txn) deleteOwner(o owner) error {
	prefix := o.row("")
	for _, bucket := range [][]byte{bucketSecrets, bucketSealed} {
		var keys [][]byte
		c := t.Bucket(bucket).Cursor()
		for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
			keys = append(keys, slices.Clone(k))
		}
		for _, k := range keys {
			if err := t.delete(bucket, k); err != nil {
				return err
			}
		}
	}
	return nil
}

// UpdateSecrets sets, deletes and rolls back secrets of a workspace, or global ones, in one
// transaction: all or none, and at most one new generation a workspace. A rollback
// sets the value of an older version, as a new version. A global
// one reaches, by a new generation, every workspace that has no secret of its
// own under the key, nor a model, and is not being deleted. All of them have it
// when UpdateSecrets returns; of some thousands Config.OnCommit tells afterwards.
//
// Errors: *NotFoundError, ErrDeleting, ErrEtag (Options.Etag is the one
// secret's), *KeyError with ErrModelKey, ErrNeedsFiles or ErrNotLive, *QuotaError,
// *TotalError, ErrRequestReused, ErrDiskFull; of a rollback also *KeyError with ErrUnreadable
// when the secret's row is damaged, and *VersionError with ErrVersionDisabled,
// ErrVersionDestroyed or ErrUnreadable.
func (s *Store) UpdateSecrets(ctx context.Context, scope Scope, u SecretsUpdate, opts Options) (Result, error) {
	u.Set, u.Delete = slices.Clone(u.Set), slices.Clone(u.Delete)
	var n reach
	if scope.Global() {
		n, _ = s.reachOf(ctx, &u) // an error is the change's as well, if it is made
	}
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		if scope.Global() {
			return t.updateGlobalSecrets(&u, opts.Etag, n)
		}
		return t.updateOwnSecrets(scope.WorkspaceID, &u, &opts)
	})
}

func (t *txn) updateOwnSecrets(id string, u *SecretsUpdate, opts *Options) (Result, error) {
	// The etag is not the workspace's.
	w, err := t.editWorkspace(id, &Options{Allow: opts.Allow})
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
	p, err := t.planSecrets(ownerOf(&w), &w.Spec, u, opts.Etag)
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
			u.bump(&w, ReasonSecret, t.now)
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

// updateGlobalSecrets changes global secrets, whose reach is about n.
func (t *txn) updateGlobalSecrets(u *SecretsUpdate, etag string, n reach) (Result, error) {
	p, err := t.planSecrets(owner{}, nil, u, etag)
	if err != nil {
		return Result{}, err
	}
	result := Result{Secrets: p.metadata()}
	keys := p.changedKeys()
	if len(keys) == 0 {
		return result, nil
	}
	result.Changed = true
	if u.NextStart {
		return result, t.applySecrets(p)
	}
	rollouts, err := rolloutsOf(t.Tx)
	if err != nil {
		return Result{}, err
	}
	if n.all > t.store.cfg.rollouts.above && len(rollouts) < maxRollouts {
		result.Affected = n.see
		return result, errors.Join(t.applySecrets(p), t.putRollout(rollout{Keys: keys, Time: t.now, Live: u.Live}))
	}
	var see []Workspace
	_, _, err = eachWorkspace(t.Tx, "", math.MaxInt, func(w *Workspace) {
		if sees(t.Tx, w, keys) {
			see = append(see, *w)
		}
	})
	if err != nil {
		return Result{}, err
	}
	if err := t.applySecrets(p); err != nil {
		return Result{}, err
	}
	for i := range see {
		u.bump(&see[i], ReasonGlobalSecret, t.now)
		if err := t.putWorkspace(&see[i], Change{Desired: true}); err != nil {
			return Result{}, err
		}
	}
	result.Affected = len(see)
	return result, nil
}
