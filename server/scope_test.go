package server_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/servertest"
)

var (
	byTeam   = access.Scope{Labels: map[string]string{"team": "a"}}
	byPrefix = access.Scope{Workspaces: "a-*"}
)

// as is a client with these roles in a scope.
func (h *harness) as(scope access.Scope, roles ...workspacev1.Role) *servertest.Client {
	h.t.Helper()
	return must2(h.As(access.Subject{Name: "caller", Grants: []access.Grant{{Roles: access.RolesOf(roles...), Scope: scope}}}))(h.t)
}

func team(name string) func(*createReq) {
	return func(r *createReq) { r.Workspace.Labels = map[string]string{"team": name} }
}

// A list has what the scope covers and the filter chooses, on all pages and in
// every order.
func TestScopeOfLists(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		var want []string
		for i := range 12 {
			id, of := fmt.Sprintf("%s-%02d", string("ab"[i%2]), i), string("ab"[i%2])
			h.create(id, team(of))
			if of == "a" {
				want = append(want, "workspaces/"+id)
			}
			advance(time.Second)
		}
		for _, scope := range []access.Scope{byTeam, byPrefix} {
			client := h.as(scope, viewer)
			for order, want := range map[string][]string{"": want, "create_time": want, "create_time desc": reversed(want)} {
				for filter, want := range map[string][]string{
					"": want, `labels.team = "b"`: nil, "name != \"" + want[2] + "\"": slices.Concat(want[:2], want[3:]),
				} {
					var got []string
					req := &workspacev1.ListWorkspacesRequest{PageSize: 2, OrderBy: order, Filter: filter}
					for {
						resp := must2(client.Client.ListWorkspaces(h.ctx(), req))(t)
						for _, w := range resp.GetWorkspaces() {
							got = append(got, w.GetName())
						}
						if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
							break
						}
					}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("%+v %q %q: %s", scope, order, filter, diff)
					}
				}
			}
		}
		// A page token of somebody else's opens nothing.
		all := must2(h.Client.ListWorkspaces(h.ctx(), &workspacev1.ListWorkspacesRequest{PageSize: 1}))(t)
		page := must2(h.as(byTeam, viewer).Client.ListWorkspaces(h.ctx(), &workspacev1.ListWorkspacesRequest{PageToken: all.GetNextPageToken()}))(t)
		if len(page.GetWorkspaces()) != 5 {
			t.Errorf("got %d", len(page.GetWorkspaces()))
		}
	})
}

func reversed(s []string) []string {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}

// A watch tells of what the scope covers: what comes into it, what leaves it, and
// nothing of all others, not that they are there, change or go.
func TestScopeOfWatches(t *testing.T) {
	for name, scope := range map[string]access.Scope{"by label": byTeam, "by name": byPrefix} {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, h *harness) {
				h.create("a-1", team("a"))
				h.create("b-1", team("b"))
				client := h.as(scope, viewer)
				watch := func(token string) *watchStream {
					ctx, cancel := context.WithTimeout(h.ctx(), 72*time.Hour)
					t.Cleanup(cancel)
					stream := must2(client.Client.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{ResumeToken: token}))(t)
					return &watchStream{stream, t, cancel, token}
				}
				w := watch("")
				w.want("+a-1", "synced")
				resumable := watch("")
				resumable.want("+a-1", "synced")

				// Others come, change and go; then one that may be seen.
				foreign := func() {
					h.create("b-2", team("b"))
					h.label("b-2", "c")
					h.set("workspaces/b-1/secrets/K", fmt.Sprint(time.Now()))
					h.delete("b-2")
				}
				foreign()
				h.create("a-2", team("a"))
				w.want("+a-2")
				foreign()
				h.delete("a-2")
				w.want("+a-2", "-a-2") // it is being deleted, it is gone

				if name == "by label" {
					h.label("a-1", "b") // it leaves
					w.want("-a-1")
					h.set("workspaces/a-1/secrets/K", "v") // not seen any more
					h.label("b-1", "a")                    // this one comes
					w.want("+b-1")
					// Who resumes begins anew: nobody knows what it saw.
					resumed := watch(resumable.token)
					resumed.want("resync", "+b-1", "synced")
					return
				}
				// The same token goes on where it was.
				resumed := watch(resumable.token)
				resumed.want("-a-2", "synced")
				foreign()
				h.set("workspaces/a-1/secrets/K", "v")
				resumed.want("+a-1")
			})
		})
	}
}

// A workspace is made, and moved, only where its caller may do that, on both sides.
func TestScopeOfChanges(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a-1", team("a"))
		h.create("b-1", team("b"))
		operator := h.as(byTeam, workspacev1.Role_ROLE_OPERATOR)
		named := h.as(byPrefix, workspacev1.Role_ROLE_OPERATOR)
		relabel := func(c *servertest.Client, id, to string) error {
			_, err := c.Client.UpdateWorkspace(h.ctx(), &updateReq{
				Workspace:  &ws{Name: "workspaces/" + id, Labels: map[string]string{"team": to}},
				UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels"}},
			})
			return err
		}
		h.wantUnchanged(func() {
			wantCode(t, relabel(operator, "a-1", "b"), codes.PermissionDenied, server.ReasonOutOfScope) // out of it
			wantCode(t, relabel(operator, "b-1", "a"), codes.PermissionDenied, server.ReasonOutOfScope) // into it
		})
		both := must2(h.As(access.Subject{Name: "both", Grants: []access.Grant{
			{Roles: access.RolesOf(workspacev1.Role_ROLE_OPERATOR), Scope: byTeam},
			{Roles: access.RolesOf(workspacev1.Role_ROLE_OPERATOR), Scope: access.Scope{Labels: map[string]string{"team": "b"}}},
			{Roles: access.RolesOf(viewer)},
		}}))(t)
		for _, to := range []string{"b", "a"} {
			if err := relabel(both, "a-1", to); err != nil {
				t.Errorf("from one to the other of its scopes: %v", err)
			}
		}
		wantCode(t, relabel(both, "a-1", "c"), codes.PermissionDenied, server.ReasonOutOfScope)
		if err := relabel(named, "a-1", "a"); err != nil { // labels are nothing to it
			t.Error(err)
		}
		// Nobody gives itself a role by a label: the values of this one are another's.
		climber := must2(h.As(access.Subject{Name: "climber", Grants: []access.Grant{
			{Roles: access.RolesOf(workspacev1.Role_ROLE_OPERATOR), Scope: byPrefix},
			{Roles: access.RolesOf(workspacev1.Role_ROLE_SECRET_WRITER), Scope: access.Scope{Labels: map[string]string{"team": "mine"}}},
		}}))(t)
		h.wantUnchanged(func() {
			wantCode(t, relabel(climber, "a-1", "mine"), codes.PermissionDenied, server.ReasonOutOfScope)
		})
		if err := relabel(climber, "a-1", "other"); err != nil {
			t.Error(err)
		}
		if err := relabel(named, "a-1", "a"); err != nil {
			t.Error(err)
		}

		make := func(c *servertest.Client, id, of string, secrets ...*secret) error {
			_, err := c.Client.CreateWorkspace(h.ctx(), &createReq{
				WorkspaceId: id, Workspace: &ws{Spec: spec(), Labels: map[string]string{"team": of}}, Secrets: secrets,
			})
			return err
		}
		for name, test := range map[string]struct {
			err  error
			want string
		}{
			"in the label":                      {make(operator, "c-1", "a"), ""},
			"in the label, the server's id":     {make(operator, "", "a"), ""},
			"outside the label":                 {make(operator, "c-2", "b"), server.ReasonOutOfScope},
			"without the label":                 {make(operator, "c-2", ""), server.ReasonOutOfScope},
			"in the name":                       {make(named, "a-2", "x"), ""},
			"outside the name":                  {make(named, "c-3", "a"), server.ReasonOutOfScope},
			"outside the name, the server's":    {make(named, "", "a"), server.ReasonOutOfScope},
			"secrets need another role":         {make(operator, "c-4", "a", text("K", "v")), server.ReasonRoleMissing},
			"secrets where it is secret-writer": {make(h.as(byTeam, workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_SECRET_WRITER), "c-5", "a", text("K", "v")), ""},
			"a secret-writer is no operator":    {make(h.as(access.Scope{}, workspacev1.Role_ROLE_SECRET_WRITER), "c-6", "a"), server.ReasonRoleMissing},
			"an operator without secrets":       {make(h.as(access.Scope{}, workspacev1.Role_ROLE_OPERATOR), "c-7", "a", text("K", "v")), server.ReasonRoleMissing},
		} {
			if got := refusal(test.err); got != test.want || test.want == "" && test.err != nil {
				t.Errorf("%s: got %v, want %q", name, test.err, test.want)
			}
		}
	})
}

// A wait ends when the workspace leaves the scope.
func TestScopeOfWaits(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a-1", team("a"))
		gate := h.HoldCycle("a-1")
		defer gate.Release()
		must2(h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/a-1"}))(t)
		done := make(chan error, 1)
		client := h.as(byTeam, viewer)
		go func() {
			_, err := client.Client.WaitWorkspace(h.ctx(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/a-1"})
			done <- err
		}()
		synctest.Wait()
		h.label("a-1", "b")
		wantCode(t, <-done, codes.PermissionDenied, server.ReasonOutOfScope)
	})
}
