// Package access is who makes a call and what that one may do.
package access

import "context"

// Subject is who makes a call. The zero value is nobody, who may do nothing.
type Subject struct {
	// Name is unique among subjects, like `unix:uid=1000`; it stands in logs.
	Name string
}

// subjectKey is the context's key for a call's subject.
type subjectKey struct{}

// WithSubject is ctx for a call that subject makes.
func WithSubject(ctx context.Context, subject Subject) context.Context {
	return context.WithValue(ctx, subjectKey{}, subject)
}

// SubjectOf is who makes the call of ctx: nobody before it was authenticated.
func SubjectOf(ctx context.Context) Subject {
	subject, _ := ctx.Value(subjectKey{}).(Subject)
	return subject
}
