package store

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// total returns which quota an error names.
func total(err error) string {
	var e *TotalError
	if errors.As(err, &e) {
		return e.What
	}
	return ""
}

func (h *harness) withQuotas(q Quotas) {
	h.t.Helper()
	h.cfg.Quotas = q
	h.reopen()
}

// counted checks that the totals in memory are those of the rows.
func (h *harness) counted() {
	h.t.Helper()
	if err := h.Ping(ctx); err != nil { // the writer is done
		h.t.Fatal(err)
	}
	var want Quotas
	if err := h.view(func(tx *bolt.Tx) (err error) { want, err = countTotals(tx); return err }); err != nil {
		h.t.Fatal(err)
	}
	if h.totals != want {
		h.t.Errorf("%+v are counted, there are %+v", h.totals, want)
	}
}

func TestQuotas(t *testing.T) {
	h := newHarness(t)
	h.withQuotas(Quotas{Workspaces: 3, Secrets: 4, Bytes: 100})
	create := func(id string, secrets ...SecretValue) string {
		_, err := h.CreateWorkspace(ctx, NewWorkspace{ID: id, Secrets: secrets}, Options{})
		return total(err)
	}
	update := func(scope Scope, u SecretsUpdate) string {
		_, err := h.UpdateSecrets(ctx, scope, u, Options{})
		return total(err)
	}
	for i, step := range []struct {
		do   func() string
		want string
	}{
		{func() string { return create("a", value("K", "1"), value("L", "2")) }, ""},
		{func() string { return create("b", value("K", "1"), value("L", "2"), value("M", "3")) }, "secrets"},
		{func() string { return create("b") }, ""},
		{func() string { return create("c", value("K", strings.Repeat("x", 99))) }, "bytes of secrets"},
		{func() string { return create("c", value("K", "1")) }, ""},
		{func() string { return create("d") }, "workspaces"},
		{func() string { return update(Scope{}, set("G", "1")) }, ""},
		{func() string { return update(in("a"), set("N", "1")) }, "secrets"},
		{func() string { return update(in("a"), set("K", strings.Repeat("y", 98))) }, "bytes of secrets"},
		{func() string { return update(in("a"), set("K", "9")) }, ""},                                                // not larger, whatever older versions take
		{func() string { return update(in("a"), SecretsUpdate{Set: set("N", "1").Set, Delete: []string{"L"}}) }, ""}, // one for another
		{func() string {
			h.remove("b")
			return create("d")
		}, ""},
		{func() string {
			h.remove("a") // with its two
			return create("e", value("K", "1"), value("L", "2"))
		}, ""},
		{func() string { return update(in("e"), set("M", "1")) }, "secrets"},
	} {
		if got := step.do(); got != step.want {
			t.Errorf("step %d: %q, want %q", i, got, step.want)
		}
		h.counted()
	}
	h.reopen()
	h.counted()
	// What was more than there may be by now stays, and can be made less.
	h.withQuotas(Quotas{Workspaces: 1, Secrets: 1, Bytes: 1})
	if got := update(in("e"), set("K", "other")); got == "" {
		t.Error("it has grown")
	}
	if got := update(in("e"), set("K", "2")); got != "" {
		t.Error(got)
	}
	if got := update(in("e"), SecretsUpdate{Delete: []string{"K"}}); got != "" {
		t.Error(got)
	}
	h.counted()
}

// Many at once get exactly what there is, and those that are refused harm none.
func TestQuotas_AtOnce(t *testing.T) {
	h := newHarness(t)
	h.withQuotas(Quotas{Workspaces: 50, Secrets: 70})
	h.db.NoSync = true
	var made, refused sync.Map
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			_, err := h.CreateWorkspace(ctx, NewWorkspace{ID: fmt.Sprint("w", i), Secrets: []SecretValue{value("K", "1")}}, Options{})
			switch {
			case err == nil:
				made.Store(i, true)
			case total(err) == "workspaces":
				refused.Store(i, true)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	length := func(m *sync.Map) (n int) {
		m.Range(func(any, any) bool { n++; return true })
		return n
	}
	if length(&made) != 50 || length(&refused) != 150 {
		t.Errorf("%d were made, %d refused", length(&made), length(&refused))
	}
	h.counted()
}
