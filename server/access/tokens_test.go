package access

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/workspaced/workspaced/store"
)

// hastyStore is a store in which a token is revoked as soon as it is there, before
// the one who made it hears of it.
type hastyStore struct {
	TokenStore
	revoke func(id string)
}

func (*hastyStore) Tokens() ([]store.Token, error) { return nil, nil }

func (s *hastyStore) CreateToken(_ context.Context, t store.Token, _ store.Options) (store.Token, []string, error) {
	s.revoke(t.ID)
	return t, nil, nil
}

func (*hastyStore) RevokeToken(_ context.Context, id string, _ store.Options) (store.Token, bool, error) {
	return store.Token{ID: id, Hash: make([]byte, 32), ExpireTime: time.Now().Add(time.Hour), RevokeTime: time.Now()}, true, nil
}

// A token that is revoked before its maker has the answer stays revoked.
func TestTokens_RevokedWhileMade(t *testing.T) {
	st := new(hastyStore)
	tokens, err := NewTokens(st, nil, func() {})
	if err != nil {
		t.Fatal(err)
	}
	st.revoke = func(id string) {
		if _, _, err := tokens.Revoke(t.Context(), id, store.Options{}); err != nil {
			t.Error(err)
		}
	}
	made, _, err := tokens.Create(t.Context(), store.Token{}, time.Hour, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if tokens.byID[made.ID].identity.check() == nil {
		t.Error("the token is good")
	}
}

// Why a caller is refused is asked once: a certificate can be good again a moment later.
func TestAdmit_AsksOnce(t *testing.T) {
	asked := 0
	id := &Identity{Subject: Subject{Name: "cert:x"}, valid: func() error {
		if asked++; asked == 1 {
			return errors.New("no longer trusted")
		}
		return nil
	}}
	_, err := Policy{}.Admit("/any/method", id)
	var refused *UnauthenticatedError
	if !errors.As(err, &refused) || refused == nil || refused.Why != "cert:x: no longer trusted" {
		t.Errorf("got %v", err)
	}
}
