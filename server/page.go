package server

import (
	"cmp"
	"container/heap"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"go.einride.tech/aip/ordering"

	"github.com/workspaced/workspaced/store"
)

// Sizes of pages (AIP-158).
const (
	defaultPageSize = 100
	maxPageSize     = 1000
	// maxPageBytes ends a page early: clients refuse messages above 4 MiB unless
	// they are told otherwise. One workspace is well below the rest.
	maxPageBytes = 2 << 20
)

func pageSize(asked int32) int {
	switch {
	case asked <= 0:
		return defaultPageSize
	case asked > maxPageSize:
		return maxPageSize
	}
	return int(asked)
}

// cursor is the place of the last item of a page: a page continues behind it,
// however many pages came before.
type cursor struct {
	ID     string    `json:"i"`
	Create time.Time `json:"c,omitzero"`
	Update time.Time `json:"u,omitzero"`
}

// tokenEncoding has no variants: each token has one spelling.
var tokenEncoding = base64.RawURLEncoding.Strict()

const tagSize = 12

// tag binds a token to the list that it belongs to. It is no protection, a
// token opens nothing: it tells a caller's mistake from a place in the list.
func tag(list []string, payload []byte) []byte {
	mac := hmac.New(sha256.New, []byte(strings.Join(list, "\x00")))
	mac.Write(payload)
	return mac.Sum(nil)[:tagSize]
}

// encodeToken makes the token of a place in a list. The list is everything that
// has to be the same on the next page.
func encodeToken(place any, list ...string) string {
	payload, err := json.Marshal(place)
	if err != nil {
		panic(err) // strings, numbers and times can be marshalled
	}
	return tokenEncoding.EncodeToString(append(tag(list, payload), payload...))
}

// decodeToken reports whether the token is one of the list.
func decodeToken(token string, place any, list ...string) bool {
	raw, err := tokenEncoding.DecodeString(token)
	if err != nil || len(raw) < tagSize {
		return false
	}
	payload := raw[tagSize:]
	return hmac.Equal(raw[:tagSize], tag(list, payload)) && json.Unmarshal(payload, place) == nil
}

// decodeCursor returns the zero cursor for an empty token: the first page.
func decodeCursor(token string, list ...string) (c cursor, err error) {
	if token != "" && !decodeToken(token, &c, list...) {
		return cursor{}, invalid("page_token", "must be the next_page_token of a response to the same request, with the same parent, filter and order")
	}
	return c, nil
}

// parseOrder checks order_by. Its zero value is the order by name.
func parseOrder(s string) (ordering.OrderBy, error) {
	var order ordering.OrderBy
	err := order.UnmarshalString(s)
	if err == nil {
		err = order.ValidateForPaths("name", "create_time", "update_time")
	}
	if err != nil {
		return ordering.OrderBy{}, invalid("order_by", "must be name, create_time or update_time, each with ` desc` if wanted, joined by commas")
	}
	return order, nil
}

// byName reports whether the order is that of the store.
func byName(order ordering.OrderBy) bool {
	return len(order.Fields) == 0 || order.Fields[0] == ordering.Field{Path: "name"}
}

func cursorOf(w *store.Workspace) cursor {
	return cursor{ID: w.ID, Create: w.CreateTime.UTC().Round(0), Update: w.UpdateTime.UTC().Round(0)}
}

// compareCursors orders by the fields, then by name, so that no two are equal.
func compareCursors(order ordering.OrderBy, a, b cursor) int {
	for _, f := range order.Fields {
		var c int
		switch f.Path {
		case "create_time":
			c = a.Create.Compare(b.Create)
		case "update_time":
			c = a.Update.Compare(b.Update)
		default:
			c = cmp.Compare(a.ID, b.ID)
		}
		if f.Desc {
			c = -c
		}
		if c != 0 {
			return c
		}
	}
	return cmp.Compare(a.ID, b.ID)
}

// topN keeps the first n of the workspaces that it is shown, in an order. It is
// a heap with the last of them on top.
type topN struct {
	order ordering.OrderBy
	n     int
	kept  []store.Workspace
}

func (t *topN) Len() int      { return len(t.kept) }
func (t *topN) Swap(i, j int) { t.kept[i], t.kept[j] = t.kept[j], t.kept[i] }
func (t *topN) Push(x any)    { t.kept = append(t.kept, x.(store.Workspace)) }
func (t *topN) Pop() any {
	last := t.kept[len(t.kept)-1]
	t.kept = t.kept[:len(t.kept)-1]
	return last
}

func (t *topN) Less(i, j int) bool { return t.compare(&t.kept[i], &t.kept[j]) > 0 }

func (t *topN) compare(a, b *store.Workspace) int {
	return compareCursors(t.order, cursorOf(a), cursorOf(b))
}

func (t *topN) offer(w *store.Workspace) {
	switch {
	case len(t.kept) < t.n:
		heap.Push(t, *w)
	case t.compare(w, &t.kept[0]) < 0:
		t.kept[0] = *w
		heap.Fix(t, 0)
	}
}

func (t *topN) sorted() []store.Workspace {
	slices.SortFunc(t.kept, func(a, b store.Workspace) int { return t.compare(&a, &b) })
	return t.kept
}
