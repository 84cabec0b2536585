package server_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/servertest"
	"github.com/workspaced/workspaced/store"
)

// names lists all pages, in order.
func (h *harness) names(req *workspacev1.ListWorkspacesRequest) (names []string, pages int) {
	h.t.Helper()
	for {
		resp := must2(h.Client.ListWorkspaces(h.ctx(), req))(h.t)
		pages++
		if len(resp.GetWorkspaces()) > int(req.GetPageSize()) && req.GetPageSize() > 0 {
			h.t.Errorf("a page of %d", len(resp.GetWorkspaces()))
		}
		for _, w := range resp.GetWorkspaces() {
			names = append(names, strings.TrimPrefix(w.GetName(), "workspaces/"))
		}
		if resp.GetNextPageToken() == "" {
			return names, pages
		}
		req = proto.CloneOf(req)
		req.PageToken = resp.GetNextPageToken()
	}
}

func TestListPagesAndOrders(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for i := range 7 {
			h.create(fmt.Sprintf("w%d", 6-i), func(r *createReq) { r.Workspace.Labels = map[string]string{"odd": fmt.Sprint(i % 2)} })
			advance(time.Second)
		}
		h.set("workspaces/w3/secrets/A", "x")
		byName := []string{"w0", "w1", "w2", "w3", "w4", "w5", "w6"}
		byUpdate := []string{"w6", "w5", "w4", "w2", "w1", "w0", "w3"}
		reversed := func(s []string) []string { s = slices.Clone(s); slices.Reverse(s); return s }
		for _, tt := range []struct {
			order, filter string
			want          []string
		}{
			{"", "", byName},
			{"name", "", byName},
			{"name desc", "", reversed(byName)},
			{"create_time", "", reversed(byName)},
			{"create_time desc", "", byName},
			{"update_time", "", byUpdate},
			{" update_time  desc , name", "", reversed(byUpdate)},
			{"", `labels.odd = "1"`, []string{"w1", "w3", "w5"}},
			{"update_time", `labels.odd = "1"`, []string{"w5", "w1", "w3"}},
			{"", `labels.odd = "7"`, nil},
		} {
			for _, size := range []int32{0, 1, 2, 3, 7, 1000, 5000} {
				got, pages := h.names(&workspacev1.ListWorkspacesRequest{PageSize: size, OrderBy: tt.order, Filter: tt.filter})
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("%q %q pages of %d: %s", tt.order, tt.filter, size, diff)
				}
				if want := (len(tt.want) + int(size) - 1) / int(max(size, 1)); size > 0 && pages != max(want, 1) {
					t.Errorf("%q %q pages of %d: %d pages", tt.order, tt.filter, size, pages)
				}
			}
		}
	})
}

func TestListTokensBelongToTheirList(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for i := range 5 {
			h.create(fmt.Sprintf("w%d", i))
			h.set(fmt.Sprintf("workspaces/w0/secrets/K%d", i), "x")
		}
		first := &workspacev1.ListWorkspacesRequest{PageSize: 2, Filter: "NOT parked", OrderBy: "name"}
		token := must2(h.Client.ListWorkspaces(h.ctx(), first))(t).GetNextPageToken()
		list := func(edit func(*workspacev1.ListWorkspacesRequest)) ([]string, error) {
			req := proto.CloneOf(first)
			req.PageToken = token
			edit(req)
			resp, err := h.Client.ListWorkspaces(h.ctx(), req)
			var names []string
			for _, w := range resp.GetWorkspaces() {
				names = append(names, w.GetName())
			}
			return names, err
		}
		for what, edit := range map[string]func(*workspacev1.ListWorkspacesRequest){
			"filter": func(r *workspacev1.ListWorkspacesRequest) { r.Filter = "" },
			"order":  func(r *workspacev1.ListWorkspacesRequest) { r.OrderBy = "name desc" },
			"damage": func(r *workspacev1.ListWorkspacesRequest) { r.PageToken = "A" + r.PageToken },
		} {
			if _, err := list(edit); fields(err)["page_token"] == "" {
				t.Errorf("%s: %v", what, err)
			}
		}
		if _, err := h.Client.ListSecrets(h.ctx(), &workspacev1.ListSecretsRequest{Parent: "workspaces/w0", PageToken: token}); fields(err)["page_token"] == "" {
			t.Errorf("another RPC's token: %v", err)
		}
		// A page goes on where the one before ended, whatever happened in between,
		// also with another size and after a restart.
		h.create("w1b")
		must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/w0"}))(t)
		must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/w1"}))(t)
		synctest.Wait()
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		got, err := list(func(r *workspacev1.ListWorkspacesRequest) { r.PageSize = 3 })
		if diff := cmp.Diff([]string{"workspaces/w1b", "workspaces/w2", "workspaces/w3"}, got); diff != "" || err != nil {
			t.Error(diff, err)
		}
	})
}

// TestListPagesFitIntoAMessage: also of the largest workspaces, whatever size of
// page is asked for.
func TestListPagesFitIntoAMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		env := make(map[string]string)
		for i := range 8 {
			env[fmt.Sprintf("V%d", i)] = strings.Repeat("x", 32000)
		}
		var all []store.Workspace
		var want []string
		for i := range 17 { // more than 4 MiB
			want = append(want, fmt.Sprintf("w%02d", i))
			all = append(all, store.Workspace{ID: want[i], Spec: store.Spec{Image: image, Env: env}})
		}
		_, conn, _ := serve(t, server.Config{Hub: make(hints), Store: &faultyStore{
			list: func(after string, limit int, match func(*store.Workspace) bool) (page []store.Workspace, more bool, err error) {
				for i := range all {
					switch {
					case all[i].ID <= after || match != nil && !match(&all[i]):
					case limit > 0 && len(page) == limit:
						return page, true, nil
					default:
						page = append(page, all[i])
					}
				}
				return page, false, nil
			},
		}})
		h := &harness{t: t, Server: &servertest.Server{Client: workspacev1.NewWorkspaceControlClient(conn)}}
		for _, order := range []string{"", "create_time"} {
			got, pages := h.names(&workspacev1.ListWorkspacesRequest{PageSize: 1000, OrderBy: order})
			if diff := cmp.Diff(want, got); diff != "" || pages != 3 {
				t.Errorf("%d pages: %s", pages, diff)
			}
		}
	})
}
