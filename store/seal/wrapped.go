package seal

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
)

// KEK is a key encryption key: it wraps the data keys, and is asked for nothing
// else. [Local] is one, a key management service is another.
type KEK interface {
	// Name says where it is kept, for messages: it has nothing secret in it.
	Name() string
	// EncryptWithContext wraps, bound to the associated data.
	EncryptWithContext(ctx context.Context, plain, associated []byte) ([]byte, error)
	// DecryptWithContext unwraps, or returns ErrOpen when it can tell that this is
	// not what it has wrapped. Its other errors name the reason and nothing secret.
	DecryptWithContext(ctx context.Context, wrapped, associated []byte) ([]byte, error)
}

// MaxKeys is how many data keys there are at most: the one that seals, and those
// before it that are not retired yet.
const MaxKeys = 8

// ErrTooManyKeys: there are MaxKeys. Some have to be retired first.
var ErrTooManyKeys = errors.New("too many data keys")

// KEKError says that a KEK could not do its part.
type KEKError struct {
	Name string // the KEK's
	Err  error  // its error; ErrOpen: it is another key
}

func (e *KEKError) Error() string { return fmt.Sprintf("%s: %v", e.Name, e.Err) }

// Unwrap returns Err.
func (e *KEKError) Unwrap() error { return e.Err }

// Wrapped are data keys as they are stored: Tink's encrypted keysets.
type Wrapped struct {
	// KEK is the name of the one that has wrapped them.
	KEK string `json:"kek"`
	// Keys are all of them.
	Keys []byte `json:"keys"`
	// Newest is Keys without those that are to be retired, wrapped in advance so
	// that no KEK is needed then; nil: there are none.
	Newest []byte `json:"newest,omitempty"`
}

// Rotating reports whether there are keys that are to be retired.
func (w *Wrapped) Rotating() bool { return len(w.Newest) > 0 }

// Create makes a first data key for a database. Its id binds what is wrapped to
// it: in another database it is of no use.
func Create(ctx context.Context, kek KEK, database string) (*Sealer, Wrapped, error) {
	handle, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		return nil, Wrapped{}, err
	}
	s, err := newSealer(handle)
	if err != nil {
		return nil, Wrapped{}, err
	}
	w, err := s.wrap(ctx, kek, database)
	return s, w, err
}

// Unwrap returns a database's data keys, or a *KEKError.
func Unwrap(ctx context.Context, kek KEK, database string, w Wrapped) (*Sealer, error) {
	asked := &askedKEK{KEK: kek}
	handle, err := keyset.ReadWithContext(ctx, keyset.NewBinaryReader(bytes.NewReader(w.Keys)), asked, wrapAssociated(database))
	if asked.err != nil {
		return nil, &KEKError{kek.Name(), asked.err}
	}
	if err != nil { // what was unwrapped is authentic, so this was no keyset before either
		return nil, &KEKError{kek.Name(), ErrOpen}
	}
	return newSealer(handle)
}

// Direct returns a sealer over the KEK's own keys, as databases were sealed before
// they had data keys.
func Direct(kek *Local) (*Sealer, error) { return newSealer(kek.handle) }

// Wrap wraps the data keys, for another KEK than they were wrapped by, say.
func (s *Sealer) Wrap(ctx context.Context, kek KEK, database string) (Wrapped, error) {
	return s.wrap(ctx, kek, database)
}

// Next are the data keys after a rotation, or after the older ones were retired.
// They are not in use yet.
type Next struct {
	from, keys *dataKeys
	// Wrapped is what has to be stored before Use.
	Wrapped Wrapped
}

// Primary is the id of the key that will seal.
func (n *Next) Primary() uint32 { return n.keys.primary }

// Rotate makes a new data key and changes nothing: see Use. The others are to be
// retired. Its errors are *KEKError, ErrTooManyKeys and internal ones.
func (s *Sealer) Rotate(ctx context.Context, kek KEK, database string) (*Next, error) {
	keys := s.keys.Load()
	if keys.handle.Len() >= MaxKeys {
		return nil, ErrTooManyKeys
	}
	manager := keyset.NewManagerFromHandle(keys.handle)
	id, err := manager.Add(aead.AES256GCMKeyTemplate())
	if err == nil {
		err = manager.SetPrimary(id)
	}
	if err != nil {
		return nil, err
	}
	handle, err := manager.Handle()
	if err != nil {
		return nil, err
	}
	next, err := newSealer(handle)
	if err != nil {
		return nil, err
	}
	w, err := next.wrap(ctx, kek, database)
	if err != nil {
		return nil, err
	}
	next.keys.Load().former = keys.former
	return &Next{from: keys, keys: next.keys.Load(), Wrapped: w}, nil
}

// Retire returns the keys without all but the one that seals, of what is stored,
// and changes nothing: see Use. The others are not stored any more, but open until
// Forget.
func (s *Sealer) Retire(stored Wrapped) (*Next, error) {
	newest, err := s.newest()
	if err != nil {
		return nil, err
	}
	newest.keys.Load().former = s.keys.Load()
	return &Next{from: s.keys.Load(), keys: newest.keys.Load(), Wrapped: Wrapped{KEK: stored.KEK, Keys: stored.Newest}}, nil
}

// Forget forgets the keys that were retired, once nobody reads any more what was
// there before that.
func (s *Sealer) Forget() {
	for {
		keys := s.keys.Load()
		forgetful := *keys
		forgetful.former = nil
		if s.keys.CompareAndSwap(keys, &forgetful) {
			return
		}
	}
}

// Follows reports whether the sealer has still the keys that next was made from.
func (s *Sealer) Follows(next *Next) bool { return s.keys.Load() == next.from }

// Use has the next keys from now on.
func (s *Sealer) Use(next *Next) { s.keys.Store(next.keys) }

// newest returns a sealer that has only the key that seals.
func (s *Sealer) newest() (*Sealer, error) {
	keys := s.keys.Load()
	manager := keyset.NewManagerFromHandle(keys.handle)
	for _, id := range s.KeyIDs() {
		if id == keys.primary {
			continue
		}
		if err := manager.Delete(id); err != nil {
			return nil, err
		}
	}
	handle, err := manager.Handle()
	if err != nil {
		return nil, err
	}
	return newSealer(handle)
}

// wrap wraps all keys, and the newest by itself if there are others.
func (s *Sealer) wrap(ctx context.Context, kek KEK, database string) (Wrapped, error) {
	keys, err := wrapHandle(ctx, kek, database, s.keys.Load().handle)
	if err != nil || s.keys.Load().handle.Len() == 1 {
		return Wrapped{KEK: kek.Name(), Keys: keys}, err
	}
	newest, err := s.newest()
	if err != nil {
		return Wrapped{}, err
	}
	alone, err := wrapHandle(ctx, kek, database, newest.keys.Load().handle)
	return Wrapped{KEK: kek.Name(), Keys: keys, Newest: alone}, err
}

func wrapHandle(ctx context.Context, kek KEK, database string, handle *keyset.Handle) ([]byte, error) {
	var b bytes.Buffer
	asked := &askedKEK{KEK: kek}
	err := handle.WriteWithContext(ctx, keyset.NewBinaryWriter(&b), asked, wrapAssociated(database))
	if asked.err != nil {
		return nil, &KEKError{kek.Name(), asked.err}
	}
	return b.Bytes(), err
}

func wrapAssociated(database string) []byte {
	return AssociatedData("workspaced data keys", database)
}

// askedKEK remembers the KEK's error, of which Tink keeps the text alone.
type askedKEK struct {
	KEK
	err error
}

func (k *askedKEK) EncryptWithContext(ctx context.Context, plain, associated []byte) (wrapped []byte, err error) {
	wrapped, k.err = k.KEK.EncryptWithContext(ctx, plain, associated)
	return wrapped, k.err
}

func (k *askedKEK) DecryptWithContext(ctx context.Context, wrapped, associated []byte) (plain []byte, err error) {
	plain, k.err = k.KEK.DecryptWithContext(ctx, wrapped, associated)
	return plain, k.err
}
