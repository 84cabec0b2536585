package server

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/store"
)

func TestTokenIsBoundToItsList(t *testing.T) {
	place := cursor{ID: "ws-1", Create: time.Unix(1, 2).UTC(), Update: time.Unix(3, 4).UTC()}
	token := encodeToken(place, "workspaces", "instance", "parked", "name")
	var got cursor
	if !decodeToken(token, &got, "workspaces", "instance", "parked", "name") {
		t.Fatal("its own list refuses it")
	}
	if diff := cmp.Diff(place, got); diff != "" {
		t.Error(diff)
	}
	for _, list := range [][]string{
		{"secrets", "instance", "parked", "name"},
		{"workspaces", "other", "parked", "name"},
		{"workspaces", "instance", "", "name"},
		{"workspaces", "instance", "parked", "name desc"},
		{"workspaces", "instance", "parked"},
	} {
		if decodeToken(token, &got, list...) {
			t.Errorf("%q takes it", list)
		}
	}
	for i := range token {
		damaged := []byte(token)
		damaged[i] ^= 1
		if decodeToken(string(damaged), &got, "workspaces", "instance", "parked", "name") {
			t.Errorf("damaged at %d it is taken", i)
		}
	}
}

func FuzzPageToken(f *testing.F) {
	f.Add("")
	f.Add("AAAA")
	f.Add(encodeToken(cursor{ID: "ws-1"}, "list"))
	f.Add(encodeToken(cursor{ID: "ws-1"}, "other"))
	f.Add(encodeToken("no cursor", "list"))
	f.Fuzz(func(t *testing.T, token string) {
		c, err := decodeCursor(token, "list")
		if err != nil && c != (cursor{}) {
			t.Errorf("a refused token gives %v", c)
		}
		if err == nil && token != "" {
			var again cursor
			if !decodeToken(encodeToken(c, "list"), &again, "list") || again != c {
				t.Errorf("%v becomes %v", c, again)
			}
		}
	})
}

func TestTopNKeepsTheFirst(t *testing.T) {
	order, err := parseOrder("update_time desc, create_time")
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	var all []store.Workspace
	for i := range 500 {
		all = append(all, store.Workspace{
			ID:         fmt.Sprintf("w%03d", i),
			CreateTime: time.Unix(r.Int64N(5), 0),
			UpdateTime: time.Unix(r.Int64N(5), 0),
		})
	}
	top := &topN{order: order, n: 20}
	for i := range all {
		top.offer(&all[i])
	}
	slices.SortFunc(all, func(a, b store.Workspace) int { return compareCursors(order, cursorOf(&a), cursorOf(&b)) })
	if diff := cmp.Diff(ids(all[:20]), ids(top.sorted())); diff != "" {
		t.Error(diff)
	}
}

func ids(ws []store.Workspace) (ids []string) {
	for _, w := range ws {
		ids = append(ids, w.ID)
	}
	return ids
}
