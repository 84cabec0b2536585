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

// A running container takes in files and no variables: whatever it may have as a
// variable, or would have, is no live change.
func TestSecrets_Live(t *testing.T) {
	now := func(u SecretsUpdate) SecretsUpdate { return u }
	later := func(u SecretsUpdate) SecretsUpdate { u.NextStart = true; return u }
	type change struct {
		scope Scope
		u     SecretsUpdate
	}
	own, global, gone := in("a"), Scope{}, SecretsUpdate{Delete: []string{"K"}}
	unlive := SecretsUpdate{Delete: []string{"K"}, Live: true}
	tests := []struct {
		name   string
		spec   Delivery
		before []change
		live   change
		want   error
	}{
		{"new file", "", nil, change{own, rotated("K", "1")}, nil},
		{"new, the spec says files", DeliveryFiles, nil, change{own, SecretsUpdate{Set: set("K", "1").Set, Live: true}}, nil},
		{"new, the spec says environment", "", nil, change{own, SecretsUpdate{Set: set("K", "1").Set, Live: true}}, ErrNotLive},
		{"file", "", []change{{own, as(DeliveryFiles, "K", "1")}}, change{own, SecretsUpdate{Set: set("K", "2").Set, Live: true}}, nil},
		{"variable", "", []change{{own, set("K", "1")}}, change{own, SecretsUpdate{Set: set("K", "2").Set, Live: true}}, ErrNotLive},
		{"variable, the same value", "", []change{{own, set("K", "1")}}, change{own, SecretsUpdate{Set: set("K", "1").Set, Live: true}}, ErrNotLive},
		{"variable becomes a file", "", []change{{own, set("K", "1")}}, change{own, rotated("K", "1")}, ErrNotLive},
		{"file becomes a variable", "", []change{{own, as(DeliveryFiles, "K", "1")}}, change{own, SecretsUpdate{Set: as(DeliveryEnv, "K", "1").Set, Live: true}}, ErrNotLive},
		{"file is deleted", "", []change{{own, as(DeliveryFiles, "K", "1")}}, change{own, unlive}, nil},
		{"variable is deleted", "", []change{{own, set("K", "1")}}, change{own, unlive}, ErrNotLive},
		{"what is not there is deleted", "", nil, change{own, unlive}, nil},
		{"hides a global variable", "", []change{{global, set("K", "1")}}, change{own, rotated("K", "1")}, ErrNotLive},
		{"hides a global file", "", []change{{global, as(DeliveryFiles, "K", "1")}}, change{own, rotated("K", "1")}, nil},
		{"hides a global one that is a file here", DeliveryFiles, []change{{global, set("K", "1")}}, change{own, rotated("K", "1")}, nil},
		{"uncovers a global variable", "", []change{{own, as(DeliveryFiles, "K", "1")}, {global, set("K", "1")}}, change{own, unlive}, ErrNotLive},
		{"uncovers a global file", "", []change{{own, as(DeliveryFiles, "K", "1")}, {global, as(DeliveryFiles, "K", "1")}}, change{own, unlive}, nil},
		{"becomes a file with the next start", "", []change{{own, set("K", "1")}, {own, later(as(DeliveryFiles, "K", "1"))}}, change{own, rotated("K", "2")}, ErrNotLive},
		{"becomes a file with the next start, twice", "", []change{{own, set("K", "1")}, {own, later(as(DeliveryFiles, "K", "1"))}, {own, later(as(DeliveryFiles, "K", "2"))}}, change{own, rotated("K", "3")}, ErrNotLive},
		{"became a file", "", []change{{own, set("K", "1")}, {own, later(as(DeliveryFiles, "K", "1"))}, {own, now(as(DeliveryFiles, "K", "1"))}}, change{own, rotated("K", "2")}, nil},
		{"variable goes with the next start", "", []change{{own, set("K", "1")}, {own, later(gone)}}, change{own, rotated("K", "2")}, ErrNotLive},
		{"variable went", "", []change{{own, set("K", "1")}, {own, now(gone)}}, change{own, rotated("K", "2")}, nil},
		{"file waits for the next start", "", []change{{own, as(DeliveryFiles, "K", "1")}, {own, later(as(DeliveryFiles, "K", "2"))}}, change{own, rotated("K", "3")}, nil},
		{"global file", "", nil, change{global, rotated("K", "1")}, nil},
		{"global, up to the specs", DeliveryFiles, nil, change{global, SecretsUpdate{Set: set("K", "1").Set, Live: true}}, ErrNotLive},
		{"global variable becomes a file", "", []change{{global, set("K", "1")}}, change{global, rotated("K", "1")}, ErrNotLive},
		{"global file is deleted", "", []change{{global, as(DeliveryFiles, "K", "1")}}, change{global, unlive}, nil},
		{"one of two", "", []change{{own, set("K", "1")}}, change{own, rotated("J", "1", "K", "2")}, ErrNotLive},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			must(h.CreateWorkspace(ctx, NewWorkspace{ID: "a", Spec: Spec{Image: "i", SecretDelivery: test.spec}}, Options{}))(t)
			for _, c := range test.before {
				must(h.UpdateSecrets(ctx, c.scope, c.u, Options{}))(t)
			}
			before, rows := must(h.Workspace("a"))(t), dump(t, h.db)
			r, err := h.UpdateSecrets(ctx, test.live.scope, test.live.u, Options{})
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if err != nil {
				var key *KeyError
				if !errors.As(err, &key) || key.Key != "K" {
					t.Errorf("error %v", err)
				}
				if diff := cmp.Diff(rows, dump(t, h.db)); diff != "" {
					t.Error(diff)
				}
				return
			}
			after := must(h.Workspace("a"))(t)
			if r.Changed != (after.Generation > before.Generation) || after.StartGeneration() != before.StartGeneration() {
				t.Errorf("changed %t, generation %d after %d, start generation %d after %d", r.Changed, after.Generation, before.Generation, after.StartGeneration(), before.StartGeneration())
			}
		})
	}
}

// Live generations are counted from the newest change that needs a start, however
// they come about.
func TestStartGeneration(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	steps := newSteps(h, 0, 1) // every change of global secrets is a rollout
	want := func(what string, generation, start int64) {
		t.Helper()
		check := func(when string) {
			t.Helper()
			if w := must(h.Workspace("a"))(t); w.Generation != generation || w.StartGeneration() != start {
				t.Errorf("%s, %s: generation %d, start generation %d, want %d and %d", what, when, w.Generation, w.StartGeneration(), generation, start)
			}
		}
		check("read")
		for steps.step(h) {
			check("rolled out")
		}
	}
	change := func(scope Scope, u SecretsUpdate) { t.Helper(); must(h.UpdateSecrets(ctx, scope, u, Options{}))(t) }
	want("created", 1, 1)
	change(in("a"), rotated("F", "1"))
	want("live", 2, 1)
	change(Scope{}, rotated("G", "1"))
	want("global live", 3, 1)
	change(Scope{}, set("H", "1"))
	want("global", 4, 4)
	change(Scope{}, rotated("G", "2"))
	change(in("a"), rotated("F", "2"))
	want("both live", 6, 4)
	change(Scope{}, rotated("G", "3"))
	must(h.RestartWorkspace(ctx, "a", Options{}))(t)
	want("live, then a restart", 8, 8)
	must(h.RestartWorkspace(ctx, "a", Options{}))(t)
	change(Scope{}, rotated("G", "4"))
	want("a restart, then live", 10, 9)
	change(in("a"), rotated("G", "own"))
	change(Scope{}, rotated("G", "hidden"))
	want("hidden", 11, 9)
}
