package access

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/workspaced/workspaced/store"
)

// A token is a beginning by which people and scanners of leaked secrets know it,
// and 32 random bytes in base64. As many of its characters as tokenShown are no
// secret: they are listed, and by them it is looked up.
const (
	tokenBegin  = "wsd_"
	tokenBytes  = 32
	tokenShown  = len(tokenBegin) + 8
	tokenLength = len(tokenBegin) + 43
)

// TokenPrefix is how the names of tokens begin.
const TokenPrefix = "tokens/"

// DefaultTokenTTL is how long tokens last, for those that are made without a time.
const DefaultTokenTTL = 90 * 24 * time.Hour

// TokenStore is what Tokens need of *store.Store.
type TokenStore interface {
	Tokens() ([]store.Token, error)
	CreateToken(ctx context.Context, t store.Token, o store.Options) (made store.Token, forgotten []string, err error)
	RevokeToken(ctx context.Context, id string, o store.Options) (store.Token, bool, error)
	UseTokens(ctx context.Context, used map[string]time.Time) error
}

// Tokens are the bearer tokens. All are in memory: a call costs no read. The
// database has their SHA-256 and never themselves; a token is 256 random bits,
// which nobody finds by trying hashes, so that a slow hash would make nothing
// safer and every call slower.
type Tokens struct {
	store TokenStore
	now   func() time.Time
	// revoked is called when a token was.
	revoked func()

	mu      sync.RWMutex
	byID    map[string]*token
	byShown map[string][]*token
}

// token is one of them in memory.
type token struct {
	hash     [sha256.Size]byte
	shown    string
	identity *Identity
	revoked  atomic.Bool
	lastUse  atomic.Int64 // Unix nanoseconds; 0: never
	stored   atomic.Int64 // lastUse as the database has it
}

// NewTokens reads the tokens that there are. Now nil is time.Now. Revoked is called
// after a token was revoked: it is Authenticator.Recheck.
func NewTokens(st TokenStore, now func() time.Time, revoked func()) (*Tokens, error) {
	if now == nil {
		now = time.Now
	}
	ts := &Tokens{store: st, now: now, revoked: revoked, byID: make(map[string]*token), byShown: make(map[string][]*token)}
	all, err := st.Tokens()
	if err != nil {
		return nil, err
	}
	for i := range all {
		ts.add(&all[i])
	}
	return ts, nil
}

// add takes in a token, or what has become of it.
func (ts *Tokens) add(row *store.Token) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t := ts.byID[row.ID]
	if t == nil {
		t = &token{hash: [sha256.Size]byte(row.Hash), shown: row.Shown}
		id := &Identity{Subject: Subject{
			Name: TokenSubject(row.Subject), Token: row.ID, Expires: row.ExpireTime, Grants: []Grant{GrantOf(row)},
		}}
		id.valid = func() error { return ts.valid(t) }
		id.token = true
		t.identity = id
		if !row.LastUseTime.IsZero() {
			t.lastUse.Store(row.LastUseTime.UnixNano())
			t.stored.Store(row.LastUseTime.UnixNano())
		}
		ts.byID[row.ID] = t
		ts.byShown[row.Shown] = append(ts.byShown[row.Shown], t)
	}
	if !row.RevokeTime.IsZero() { // for good: rows may come out of order
		t.revoked.Store(true)
	}
}

// TokenSubject is the name of the subject that shows a token made for name.
func TokenSubject(name string) string { return "token:" + name }

// GrantOf is what a token grants. A role that this program does not know is none.
func GrantOf(row *store.Token) Grant {
	g := Grant{Scope: Scope{Workspaces: row.Workspaces, Labels: maps.Clone(row.Labels)}}
	for _, name := range row.Roles {
		if role, err := parseRole(name); err == nil {
			g.Roles |= RolesOf(role)
		}
	}
	return g
}

// identify is who shows the token. Nobody can tell by what comes of it, or by how
// long it takes, a token that was never made from one that has ended.
func (ts *Tokens) identify(text string) *Identity {
	nobody := func(why string) *Identity { return &Identity{Err: &UnauthenticatedError{Token: true, Why: why}} }
	if ts == nil || len(text) != tokenLength || !strings.HasPrefix(text, tokenBegin) {
		return nobody("what was sent is no token")
	}
	hash := sha256.Sum256([]byte(text))
	ts.mu.RLock()
	alike := slices.Clone(ts.byShown[text[:tokenShown]]) // one, nearly always
	ts.mu.RUnlock()
	for _, t := range alike {
		if subtle.ConstantTimeCompare(hash[:], t.hash[:]) != 1 {
			continue
		}
		if err := t.identity.check(); err != nil {
			return &Identity{Err: err}
		}
		t.lastUse.Store(ts.now().UnixNano())
		return t.identity
	}
	return nobody("unknown token")
}

// valid returns why a token is no longer one.
func (ts *Tokens) valid(t *token) error {
	switch s := &t.identity.Subject; {
	case t.revoked.Load():
		return fmt.Errorf("tokens/%s was revoked", s.Token)
	case !ts.now().Before(s.Expires):
		return fmt.Errorf("tokens/%s expired at %s", s.Token, s.Expires.Format(time.RFC3339))
	}
	return nil
}

// errNoTokens is for an Authenticator without Tokens.
var errNoTokens = errors.New("access: there is no store of tokens")

// Create makes a token from what row says: subject, roles, scope and creator. It
// lasts for ttl. Create returns the token itself, which nobody can have a second time.
func (ts *Tokens) Create(ctx context.Context, row store.Token, ttl time.Duration, o store.Options) (store.Token, string, error) {
	if ts == nil {
		return store.Token{}, "", errNoTokens
	}
	random := make([]byte, tokenBytes)
	_, _ = rand.Read(random) // never fails
	text := tokenBegin + base64.RawURLEncoding.EncodeToString(random)
	hash := sha256.Sum256([]byte(text))
	row.ID = strings.ToLower(rand.Text()[:16])
	if o.Audit != nil {
		o.Audit.Resource = TokenPrefix + row.ID
	}
	row.Hash, row.Shown, row.ExpireTime = hash[:], text[:tokenShown], ts.now().Add(ttl)
	made, forgotten, err := ts.store.CreateToken(ctx, row, o)
	if err != nil {
		return store.Token{}, "", err
	}
	if o.ValidateOnly {
		return made, "", nil
	}
	ts.add(&made)
	ts.forget(forgotten)
	return made, text, nil
}

// forget drops tokens that ended so long ago that the store has forgotten them.
func (ts *Tokens) forget(ids []string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for _, id := range ids {
		t := ts.byID[id]
		if t == nil {
			continue
		}
		delete(ts.byID, id)
		if alike := slices.DeleteFunc(ts.byShown[t.shown], func(other *token) bool { return other == t }); len(alike) > 0 {
			ts.byShown[t.shown] = alike
		} else {
			delete(ts.byShown, t.shown)
		}
	}
}

// Revoke ends a token, and the calls that it makes. It reports whether it was one
// until now.
func (ts *Tokens) Revoke(ctx context.Context, id string, o store.Options) (store.Token, bool, error) {
	if ts == nil {
		return store.Token{}, false, errNoTokens
	}
	row, changed, err := ts.store.RevokeToken(ctx, id, o)
	if errors.Is(err, store.ErrInDoubt) { // who wanted it to end is not kept waiting for the disk
		ts.mu.RLock()
		if t := ts.byID[id]; t != nil {
			t.revoked.Store(true)
		}
		ts.mu.RUnlock()
		ts.revoked()
	}
	if err != nil {
		return store.Token{}, false, err
	}
	ts.add(&row)
	ts.revoked()
	return row, changed, nil
}

// List returns all tokens, by id.
func (ts *Tokens) List() ([]store.Token, error) {
	if ts == nil {
		return nil, errNoTokens
	}
	rows, err := ts.store.Tokens()
	if err != nil {
		return nil, err
	}
	ts.mu.RLock()
	defer ts.mu.RUnlock()
	for i := range rows {
		if t := ts.byID[rows[i].ID]; t != nil && t.lastUse.Load() > t.stored.Load() {
			rows[i].LastUseTime = time.Unix(0, t.lastUse.Load()).UTC()
		}
	}
	return rows, nil
}

// Flush writes when tokens were used last, all in one commit; nothing if none was
// since the last time. What a crash forgets is what came after the last one.
func (ts *Tokens) Flush(ctx context.Context) error {
	if ts == nil {
		return nil
	}
	used := make(map[string]time.Time)
	ts.mu.RLock()
	for id, t := range ts.byID {
		if last := t.lastUse.Load(); last > t.stored.Load() {
			used[id] = time.Unix(0, last).UTC()
		}
	}
	ts.mu.RUnlock()
	if len(used) == 0 {
		return nil
	}
	if err := ts.store.UseTokens(ctx, used); err != nil {
		return err
	}
	ts.mu.RLock()
	defer ts.mu.RUnlock()
	for id, at := range used {
		if t := ts.byID[id]; t != nil {
			t.stored.Store(at.UnixNano())
		}
	}
	return nil
}
