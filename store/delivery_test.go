package store

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What a change says of a secret's delivery, and what comes of it.
func TestSecrets_Delivery(t *testing.T) {
	tests := []struct {
		name    string
		changes []SecretsUpdate
		want    Delivery
		version int64
	}{
		{"new", []SecretsUpdate{set("K", "1")}, DeliverySpec, 1},
		{"new, as the spec says", []SecretsUpdate{as(DeliverySpec, "K", "1")}, DeliverySpec, 1},
		{"new, as a file", []SecretsUpdate{as(DeliveryFiles, "K", "1")}, DeliveryFiles, 1},
		{"as it was", []SecretsUpdate{as(DeliveryFiles, "K", "1"), set("K", "2")}, DeliveryFiles, 2},
		{"as the spec says, again", []SecretsUpdate{as(DeliveryFiles, "K", "1"), as(DeliverySpec, "K", "1")}, DeliverySpec, 2},
		{"another one", []SecretsUpdate{as(DeliveryFiles, "K", "1"), as(DeliveryEnv, "K", "1")}, DeliveryEnv, 2},
		{"the same one", []SecretsUpdate{as(DeliveryFiles, "K", "1"), as(DeliveryFiles, "K", "1")}, DeliveryFiles, 1},
		{"deleted", []SecretsUpdate{as(DeliveryFiles, "K", "1"), {Delete: []string{"K"}}, set("K", "1")}, DeliverySpec, 2},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			h.create("a")
			for _, scope := range []Scope{in("a"), {}} {
				for _, u := range test.changes {
					must(h.UpdateSecrets(ctx, scope, u, Options{}))(t)
				}
				secret := must(h.Secret(scope, "K"))(t)
				if secret.Delivery != test.want || secret.Version != test.version {
					t.Errorf("%+v: delivered by %s, version %d", scope, secret.Delivery, secret.Version)
				}
			}
			// The workspace's own wins, also over a global one of another delivery.
			must(h.UpdateSecrets(ctx, Scope{}, as(DeliveryFiles, "K", "global"), Options{}))(t)
			got := must(h.Snapshot("a"))(t).Secrets
			if len(got) != 1 || got[0].Delivery != test.want || got[0].Value.Reveal() == "global" {
				t.Errorf("the container gets %+v", got)
			}
		})
	}
}

// An environment carries no NUL: what would put one there is refused, whichever
// comes first.
func TestSecrets_NULNeedsFiles(t *testing.T) {
	const nul = "a\x00b"
	tests := []struct {
		name   string
		spec   Delivery
		scope  Scope
		before *SecretsUpdate
		u      SecretsUpdate
		want   error
	}{
		{"spec", "", in("a"), nil, set("K", nul), ErrNeedsFiles},
		{"spec says environment", DeliveryEnv, in("a"), nil, as(DeliverySpec, "K", nul), ErrNeedsFiles},
		{"spec says files", DeliveryFiles, in("a"), nil, set("K", nul), nil},
		{"spec says files, the secret does not", DeliveryFiles, in("a"), nil, as(DeliveryEnv, "K", nul), ErrNeedsFiles},
		{"the secret says files", "", in("a"), nil, as(DeliveryFiles, "K", nul), nil},
		{"it has been a file", "", in("a"), new(as(DeliveryFiles, "K", "1")), set("K", nul), nil},
		{"it has been a variable", DeliveryFiles, in("a"), new(as(DeliveryEnv, "K", "1")), set("K", nul), ErrNeedsFiles},
		{"it becomes a variable", "", in("a"), new(as(DeliveryFiles, "K", nul)), as(DeliveryEnv, "K", nul), ErrNeedsFiles},
		{"global", DeliveryFiles, Scope{}, nil, set("K", nul), ErrNeedsFiles},
		{"global file", "", Scope{}, nil, as(DeliveryFiles, "K", nul), nil},
		{"one of two", "", in("a"), nil, set("J", "1", "K", nul), ErrNeedsFiles},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			must(h.CreateWorkspace(ctx, NewWorkspace{ID: "a", Spec: Spec{Image: "i", SecretDelivery: test.spec}}, Options{}))(t)
			if test.before != nil {
				must(h.UpdateSecrets(ctx, test.scope, *test.before, Options{}))(t)
			}
			before := dump(t, h.db)
			_, err := h.UpdateSecrets(ctx, test.scope, test.u, Options{})
			var key *KeyError
			if !errors.Is(err, test.want) || err != nil && (!errors.As(err, &key) || key.Key != "K") {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if err != nil {
				if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
					t.Error(diff)
				}
				return
			}
			if got := h.values("a")["K"]; got != nul {
				t.Errorf("the value is %q", got)
			}
			// A spec that would put it into the environment.
			_, err = h.UpdateWorkspace(ctx, "a", setSpec(func(s *Spec) { s.SecretDelivery = "" }), Options{})
			want := error(nil)
			if d := must(h.Secret(test.scope, "K"))(t).Delivery; d == DeliverySpec {
				want = ErrNeedsFiles
			}
			if !errors.Is(err, want) {
				t.Errorf("another spec: got %v, want %v", err, want)
			}
		})
	}
	h := newHarness(t)
	_, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "a", Spec: Spec{Image: "i"}, Secrets: set("K", nul).Set}, Options{})
	if !errors.Is(err, ErrNeedsFiles) {
		t.Errorf("a new workspace: %v", err)
	}
}
