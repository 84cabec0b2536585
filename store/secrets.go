package store

import (
	"bytes"
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
	// Delivery is empty for DeliverySpec.
	Delivery Delivery `json:"delivery,omitempty"`
	// Binary: the value holds a NUL, and can't be put into an environment.
	Binary bool `json:"binary,omitempty"`
	// Staged: the last change, or deletion, of the key waits for the next start.
	Staged bool `json:"staged,omitempty"`
	// Variable: it is Staged, and until then containers may have what was there
	// before as a variable.
	Variable bool `json:"variable,omitempty"`
	// Restored is the version whose value the current one has by a rollback.
	Restored int64 `json:"restored,omitempty"`
	// Older are the versions before the current one that there still are, newest
	// first.
	Older []versionRecord `json:"older,omitempty"`

	// damaged: the row can't be read. What else is known the sealed value tells,
	// which can't be opened without the version.
	damaged bool
}

// decodeSecret decodes the row of an owner and key. It never fails: what can't be
// read, or is not in the index (nil: nobody looks), is damaged.
func decodeSecret(tx *bolt.Tx, x *index, key, value []byte) (r secretRecord) {
	if decode(bucketSecrets, key, value, &r) != nil || x != nil && !x.has(key, value) {
		_, sealed := newestValue(tx, key)
		return secretRecord{damaged: true, Deleted: sealed == nil, Size: max(0, len(sealed)-seal.Overhead)}
	}
	return r
}

// sums sum up an owner's secrets.
type sums struct {
	bytes    int // of all current values
	keyBytes int // of all keys
	retired  int // rows of deleted keys
	// lastVersion is no less than the version of any deleted key that has no row any
	// more.
	lastVersion int64
}

// owner is whose secrets they are.
type owner struct {
	scope Scope
	uid   string // of the workspace
}

const globalOwner = "global"

// ownerNamed returns the owner with a name; of its scope only whether it is global
// is known.
func ownerNamed(name string) owner {
	if name == globalOwner {
		return owner{}
	}
	return owner{Scope{WorkspaceID: name}, name}
}

func ownerOf(w *Workspace) owner { return owner{Scope{WorkspaceID: w.ID}, w.UID} }

// name is the owner's part of the rows' keys: its own is the name and a slash, each
// secret's that and the key. No uid is "global".
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
		CreateTime: r.CreateTime, UpdateTime: r.UpdateTime, Delivery: r.Delivery.known(),
	}
}

// get returns a key's row, and whether the key is known, which one of a deleted
// secret is as well. Without the index nobody looks whether it is the newest one.
func (o owner) get(tx *bolt.Tx, x *index, key string) (r secretRecord, known bool) {
	b := tx.Bucket(bucketSecrets).Get(o.row(key))
	if b == nil {
		return r, false
	}
	return decodeSecret(tx, x, o.row(key), b), true
}

// find returns a secret's row; *NotFoundError when there is none, *KeyError with
// ErrUnreadable when it is damaged. The index is as for get.
func (o owner) find(tx *bolt.Tx, x *index, key string) (secretRecord, error) {
	r, known := o.get(tx, x, key)
	switch {
	case !known || r.Deleted:
		return secretRecord{}, &NotFoundError{WorkspaceID: o.scope.WorkspaceID, Key: key}
	case r.damaged:
		return secretRecord{}, &KeyError{Key: key, Err: ErrUnreadable}
	}
	return r, nil
}

// has reports whether there is a secret under the key.
func (o owner) has(tx *bolt.Tx, key string) bool {
	r, known := o.get(tx, nil, key)
	return known && !r.Deleted
}

// variable reports whether a container of the owner's may have the key, with that
// row if it is known, as a variable, now or once it is started. The spec is that of
// the workspace; with none what is up to a spec may be one.
func (o owner) variable(tx *bolt.Tx, spec *Spec, key string, r *secretRecord, known bool) bool {
	switch {
	case r.Staged && r.Variable:
		return true
	case known && !r.Deleted:
		return !deliversFile(r.Delivery.known(), spec)
	case o.scope.Global() || r.Staged:
		return false
	default: // the global one counts
		return variableGlobal(tx, spec, key)
	}
}

// variableGlobal is variable for a global secret.
func variableGlobal(tx *bolt.Tx, spec *Spec, key string) bool {
	r, known := owner{}.get(tx, nil, key)
	return owner{}.variable(tx, spec, key, &r, known)
}

// each calls f with each row, also those of deleted keys, from the first key
// after the given one on, until f returns false. The index is as for get.
func (o owner) each(tx *bolt.Tx, x *index, after string, f func(key string, r *secretRecord) bool) {
	prefix := o.row("")
	c := tx.Bucket(bucketSecrets).Cursor()
	// No key contains a NUL: this is the first place behind after.
	seek := prefix
	if after != "" {
		seek = append(o.row(after), 0)
	}
	for k, v := c.Seek(seek); bytes.HasPrefix(k, prefix); k, v = c.Next() {
		if len(k) == len(prefix) { // the owner's own
			continue
		}
		r := decodeSecret(tx, x, k, v)
		if !f(string(k[len(prefix):]), &r) {
			break
		}
	}
}

// valid reports whether there can be such sums.
func (s *sums) valid() bool {
	return s.bytes >= 0 && s.keyBytes >= 0 && s.retired >= 0 && s.lastVersion >= 0
}

// add adds a row to the sums.
func (s *sums) add(key string, r *secretRecord) {
	if r.Deleted {
		s.retired++
		return
	}
	s.bytes += r.Size
	s.keyBytes += len(key)
}

// missing reports whether rows of the owner's are missing, if there are these: a page
// that the disk has lost must not cost a container a part of its secrets in silence.
// The sums lie in secrets themselves, so that one page that is not the newest can have
// both as they were together: for that there is eachValued.
func (s *sums) missing(there *sums) bool {
	return s.keyBytes != there.keyBytes || s.retired != there.retired
}

// open returns a secret's current value, or a *KeyError.
func (o owner) open(tx *bolt.Tx, sealer *seal.Sealer, key string, r *secretRecord) (seal.Plaintext, error) {
	row := o.row(key)
	k, sealed := newestValue(tx, row)
	// A later value than the row's: the row is not the newest one.
	if _, version, err := parseValue(k); r.damaged || err != nil || version != r.Version {
		return seal.Plaintext{}, &KeyError{Key: key, Err: ErrUnreadable}
	}
	return o.unseal(sealer, key, r.Version, sealed)
}

// openVersion returns the value of any version, or a *KeyError.
func (o owner) openVersion(tx *bolt.Tx, sealer *seal.Sealer, key string, version int64) (seal.Plaintext, error) {
	return o.unseal(sealer, key, version, tx.Bucket(bucketSealed).Get(o.value(key, version)))
}

func (o owner) unseal(sealer *seal.Sealer, key string, version int64, sealed []byte) (seal.Plaintext, error) {
	plain, err := sealer.Open(sealed, o.associated(key, version))
	if err != nil {
		return seal.Plaintext{}, &KeyError{Key: key, Err: ErrUnreadable}
	}
	return seal.New(plain), nil
}
