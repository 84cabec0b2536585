// Package access is who makes a call and what that one may do.
//
// Who: a connection's credentials make it a Subject (see Credentials), or a token
// in the call's metadata does, which then counts alone. What: a Subject has
// grants, roles for all workspaces or for those in a scope. A Policy, read from
// the .proto, says which roles an RPC needs.
package access

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
)

// Subject is who makes a call. The zero value is nobody, who may do nothing.
type Subject struct {
	// Name is unique among subjects, like `unix:uid=1000`; it stands in logs.
	Name string
	// Grants are what it may do.
	Grants []Grant
	// Instance is the container that it is; nil: it is none.
	Instance *Instance
	// Token is the id of the token that it showed; empty: it showed none.
	Token string
	// Expires is when its token or certificate ends; zero: never.
	Expires time.Time
}

// Grant is roles, and where they hold.
type Grant struct {
	Roles Roles
	Scope Scope
}

// Scope is some of all workspaces: those that meet everything in it. The zero
// value is all of them, and what belongs to none.
type Scope struct {
	// Workspaces is an id, or how ids begin and a * behind it.
	Workspaces string
	// Labels are those that a workspace has, each with this value.
	Labels map[string]string
}

// All reports whether the scope is everything.
func (s *Scope) All() bool { return s.Workspaces == "" && len(s.Labels) == 0 }

// Covers reports whether the target is in the scope.
func (s *Scope) Covers(t Target) bool {
	if s.All() {
		return true
	}
	if t.ID == "" || !s.coversID(t.ID) {
		return false
	}
	for key, want := range s.Labels {
		if have, ok := t.Labels[key]; !ok || have != want {
			return false
		}
	}
	return true
}

func (s *Scope) coversID(id string) bool {
	if prefix, ok := strings.CutSuffix(s.Workspaces, "*"); ok {
		return strings.HasPrefix(id, prefix)
	}
	return s.Workspaces == "" || s.Workspaces == id
}

// Target is what a call is about: a workspace, or with the zero value the daemon
// as a whole.
type Target struct {
	ID     string
	Labels map[string]string
}

// TargetOf is a workspace as a target.
func TargetOf(w *store.Workspace) Target { return Target{w.ID, w.Labels} }

// May reports whether the subject has one of the roles for the target.
func (s *Subject) May(roles Roles, t Target) bool {
	for i := range s.Grants {
		if g := &s.Grants[i]; g.Roles&roles != 0 && g.Scope.Covers(t) {
			return true
		}
	}
	return false
}

// CheckGain refuses a change of what the target is, from before to after, by which the
// subject would have a role for it that it has not now. It returns a *DeniedError.
func (s *Subject) CheckGain(before, after Target) error {
	for _, role := range bindable {
		if one := AnyOf(role); s.May(one, after) && !s.May(one, before) {
			return deny(s, []workspacev1.Role{role}, before)
		}
	}
	return nil
}

// View is what a subject gets to see of all workspaces. The zero value is
// nothing of them.
type View struct {
	all    bool
	scopes []*Scope
}

// View is what the subject has one of the roles for.
func (s *Subject) View(roles Roles) View {
	var v View
	for i := range s.Grants {
		if g := &s.Grants[i]; g.Roles&roles != 0 {
			v.all = v.all || g.Scope.All()
			v.scopes = append(v.scopes, &g.Scope)
		}
	}
	return v
}

// All reports whether it is everything.
func (v View) All() bool { return v.all }

// ByLabel reports whether a workspace can come into view, or leave it, by a
// change of its labels.
func (v View) ByLabel() bool {
	return !v.all && slices.ContainsFunc(v.scopes, func(s *Scope) bool { return len(s.Labels) > 0 })
}

// Shows reports whether a workspace is in view.
func (v View) Shows(t Target) bool {
	return v.all || slices.ContainsFunc(v.scopes, func(s *Scope) bool { return s.Covers(t) })
}

// ShowsID reports whether a workspace of this id is in view, with some labels or
// others.
func (v View) ShowsID(id string) bool {
	return v.all || slices.ContainsFunc(v.scopes, func(s *Scope) bool { return s.coversID(id) })
}

// Everything is a subject that may do everything.
func Everything(name string) Subject {
	return Subject{Name: name, Grants: []Grant{{Roles: RolesOf(workspacev1.Role_ROLE_ADMIN)}}}
}

// clone is a subject that shares nothing with s.
func (s *Subject) clone() Subject {
	c := *s
	c.Grants = slices.Clone(s.Grants)
	for i := range c.Grants {
		c.Grants[i].Scope.Labels = maps.Clone(c.Grants[i].Scope.Labels)
	}
	return c
}

// Identity is who makes a call, or why that is not known.
type Identity struct {
	Subject Subject
	// Err is why the credentials count for nothing; nil: they do, or the subject
	// is nobody.
	Err *UnauthenticatedError

	// valid returns why the credentials no longer count; nil: they always do.
	valid func() error
	token bool // the credentials are a token
}

// check returns why the identity's credentials count for nothing by now.
func (id *Identity) check() *UnauthenticatedError {
	if id.valid == nil {
		return nil
	}
	if err := id.valid(); err != nil {
		return &UnauthenticatedError{Token: id.token, Why: id.Subject.Name + ": " + err.Error()}
	}
	return nil
}

// identityKey is the context's key for a call's *Identity.
type identityKey struct{}

// WithIdentity is ctx for a call that was looked at. Nobody changes the identity
// afterwards.
func WithIdentity(ctx context.Context, id *Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

// IdentityOf is who makes the call of ctx: nobody before it was looked at.
func IdentityOf(ctx context.Context) *Identity {
	if id, ok := ctx.Value(identityKey{}).(*Identity); ok {
		return id
	}
	return &Identity{}
}

// WithSubject is ctx for a call that the subject makes.
func WithSubject(ctx context.Context, subject Subject) context.Context {
	return WithIdentity(ctx, &Identity{Subject: subject})
}

// SubjectOf is who makes the call of ctx: nobody before it was authenticated, or
// when its credentials count for nothing.
func SubjectOf(ctx context.Context) Subject { return IdentityOf(ctx).Subject }

// Allowed returns nil if the call's subject has the role for the target, or one
// that contains it, and a *DeniedError if not. It is for what an RPC's
// declaration can't say, like a field that needs another role than its RPC.
func Allowed(ctx context.Context, role workspacev1.Role, t Target) error {
	id := IdentityOf(ctx)
	if id.Subject.May(AnyOf(role), t) {
		return nil
	}
	return deny(&id.Subject, []workspacev1.Role{role}, t)
}
